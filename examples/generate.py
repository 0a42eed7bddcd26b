"""Continue a text with the embedded model, and look at what it cost."""

from localmimo import Sampling, load

with load(context=1024) as engine:
    print(engine.plan)
    done = engine.generate("The moon is", max_tokens=40, sampling=Sampling(temperature=0))
    print("The moon is" + done.text)
    print(
        f"{done.stats.generated_tokens} tokens, {done.stats.decode_tps:.1f} tokens/s, experts found {done.stats.hits}"
    )
