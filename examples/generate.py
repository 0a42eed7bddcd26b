"""Continue a text with the embedded model mimo-mini, and print what the engine did.

    python examples/generate.py

The first run packs mimo-mini, which takes a few seconds. For another model, give its pack: load("PACK", ...).
"""

from localmimo import Sampling, load

with load(context=1024) as engine:  # context: the most tokens of prompt and answer together
    print(engine.plan)  # how the model was placed in memory

    prompt = "The moon is"
    result = engine.generate(
        prompt, max_tokens=40, sampling=Sampling(temperature=0)
    )  # 0: the likeliest token
    print(prompt + result.text)

    stats = result.stats
    print(f"{stats.generated_tokens} tokens, {stats.decode_tps:.1f} tokens per second")
    print(f"experts found in each tier: {stats.hits}")
