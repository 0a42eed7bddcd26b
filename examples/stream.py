"""A conversation of three questions whose answers are printed as they are generated.

    python examples/stream.py

Each question is sent with the whole conversation before it. The engine still holds those tokens, so it reads only the
new ones, as the line after each answer shows.
"""

from localmimo import Sampling, load

messages = []
with load(context=1024) as engine:
    for question in ("Tell me about rivers.", "Tell me about bees.", "Thank you!"):
        messages.append({"role": "user", "content": question})
        print(f"> {question}")

        answer = ""
        for step in engine.stream(messages, sampling=Sampling(temperature=0.3, seed=7), max_tokens=120):
            print(step.text, end="", flush=True)
            answer += step.text
        messages.append({"role": "assistant", "content": answer})

        stats = step.stats  # of the answer so far; after the last step, of the whole answer
        print(f"\n  [{stats.prompt_tokens} tokens of prompt, {stats.reused_tokens} of them held from before]")
