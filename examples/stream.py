"""A short conversation, streamed: the second turn reads only what is new."""

from localmimo import Sampling, load

messages = [{"role": "user", "content": "Tell me about rivers."}]
with load(context=1024) as engine:
    for question in ("Tell me about bees.", "Thank you!"):
        said = ""
        for step in engine.stream(messages, sampling=Sampling(temperature=0.3, seed=7), max_tokens=120):
            print(step.text, end="", flush=True)
            said += step.text
        stats = step.stats
        print(f"\n  [{stats.prompt_tokens} tokens of prompt, {stats.reused_tokens} of them held already]")
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": question}]
