"""PyPI's openai client against `hydra serve`: openai_client.py BASE_URL KEY. `.ci/openai` starts the server, with the
demo's tiny model as "tiny" and an adapter of it as "run"."""

import asyncio
import sys

import openai

base_url, key = sys.argv[1:]
client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0)


def refused(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"expected {kind.__name__}")


# Models.
assert [model.id for model in client.models.list()] == ["tiny", "run"]
assert client.models.retrieve("run").owned_by == "hydra"

# Completions: whole, in pieces, with log-probabilities.
options = {"model": "run", "prompt": "Name three", "max_tokens": 8, "temperature": 0}
whole = client.completions.create(**options, logprobs=2, echo=True)
choice = whole.choices[0]
assert choice.text.startswith("Name three") and choice.finish_reason in ("length", "stop")
assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == len(choice.logprobs.text_offset)
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
answer = client.completions.create(**options).choices[0].text
assert choice.text == "Name three" + answer
stream = client.completions.create(**options, stream=True, stream_options={"include_usage": True})
pieces = list(stream)
assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == answer
assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens
several = client.completions.create(model="tiny", prompt=["a", "b"], n=2, max_tokens=3, seed=1)
assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
assert client.completions.create(model="tiny", prompt="Once", max_tokens=30, temperature=0, stop=["e"]).choices[0].text.count("e") == 0

plain = client.completions.create(model="tiny", prompt="Once", max_tokens=1, temperature=0, logprobs=0).choices[0]
chosen = client.completions.create(model="tiny", prompt="Once", max_tokens=5, temperature=0, logprobs=0, logit_bias={"300": 100})
assert set(chosen.choices[0].logprobs.tokens) != set(plain.logprobs.tokens) and len(set(chosen.choices[0].logprobs.tokens)) == 1
client.completions.create(model="tiny", prompt="Once", max_tokens=8, presence_penalty=1.5, frequency_penalty=-0.5)

# Chat.
messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name three"}]
options = {"model": "run", "messages": messages, "max_completion_tokens": 8, "temperature": 0}
chat = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
content = chat.choices[0].message.content
assert chat.choices[0].message.role == "assistant"
logprobs = chat.choices[0].logprobs.content
assert len(logprobs) == chat.usage.completion_tokens and all(len(token.top_logprobs) == 3 for token in logprobs)
assert b"".join(bytes(token.bytes) for token in logprobs).decode(errors="replace") == content
pieces = list(client.chat.completions.create(**options, stream=True))
assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == content
assert pieces[0].choices[0].delta.role == "assistant" and pieces[-1].choices[0].finish_reason
with client.chat.completions.stream(**options) as stream:
    assert stream.get_final_completion().choices[0].message.content == content
gates = client.chat.completions.create(**options, extra_body={"hydra_gates": True}).choices[0].model_extra["hydra"]
rows = len(gates["places"]) * gates["heads"]
assert all(len(token["gates"]) == rows for token in gates["tokens"])

# What clients send without being asked, and what they send back.
nothing = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "prediction": None, "audio": None, "stop_token_ids": []}
again = client.chat.completions.create(**options, tools=[], response_format={"type": "text"}, user="u", store=True, extra_body=nothing)
assert again.choices[0].message.content == content
replayed = [*messages, again.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "More"}]}]
client.chat.completions.create(**{**options, "messages": replayed})

# vLLM's. Of one token, the likeliest is drawn at any temperature.
warm = {**options, "temperature": 2, "seed": 3}
drawn = client.chat.completions.create(**warm, extra_body={"top_k": 1, "min_p": 0.1})
assert drawn.choices[0].message.content == content

# Errors.
error = refused(openai.BadRequestError, lambda: client.chat.completions.create(**options, extra_body={"min_tokens": 5}))
assert error.code == "unsupported_parameter" and error.param == "min_tokens"
error = refused(openai.NotFoundError, lambda: client.completions.create(model="gpt-4", prompt="a"))
assert error.code == "model_not_found"
error = refused(openai.BadRequestError, lambda: client.completions.create(model="tiny", prompt="a", temperature=3))
assert error.param == "temperature"
error = refused(openai.BadRequestError, lambda: client.completions.create(model="tiny", prompt=[5] * 600))
assert error.code == "context_length_exceeded"
tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
error = refused(openai.BadRequestError, lambda: client.chat.completions.create(**options, tools=[tool]))
assert error.code == "unsupported_parameter"
refused(openai.BadRequestError, lambda: client.embeddings.create(model="tiny", input="a"))
stranger = openai.OpenAI(base_url=base_url, api_key="sk-wrong", max_retries=0)
refused(openai.AuthenticationError, lambda: stranger.models.list())


# Several at once, of which one leaves: each has the text that it has alone.
async def together():
    clients = openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0)

    async def one(number):
        stream = await clients.completions.create(model=("tiny", "run")[number % 2], prompt="Name", max_tokens=40, seed=number % 4, stream=True)
        text = ""
        async for piece in stream:
            text += piece.choices[0].text
            if number == 11:
                return await stream.close()
        return text

    texts = await asyncio.gather(*[one(number) for number in range(12)])
    assert all(text == texts[number % 4] for number, text in enumerate(texts[:11])), texts


asyncio.run(together())
print(f"openai {openai.__version__}: models, completions, chat, streams, log-probabilities, gates and errors are as it expects")
