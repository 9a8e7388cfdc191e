"""The HTTP server as a client sees it, over a tiny decoder whose text is its token ids."""

import asyncio
import json

import pytest
from conftest import TINY

from paxattn import Engine, EngineConfig
from scripts.serve import Server


class Numbers:
    """A tokenizer: a token is a number and a space."""

    stop_ids = (96,)

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids, skip_special=False):
        return "".join(f"{i} " for i in ids)


@pytest.fixture(scope="module")
def server(tiny):
    config = EngineConfig(max_seqs=2, max_len=64, page_size=4, num_pages=20, prefill_tokens=16, decode_steps=4)
    return Server(Engine(*tiny, config, detokenize=Numbers().decode), Numbers())


async def ask(port, method, path, body=b"", lines=None):
    """Status and the lines of JSON; only so many of them where `lines` says so."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{method} {path} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    status = int((await reader.readline()).split()[1])
    while await reader.readline() != b"\r\n":
        pass
    got = []
    while size := int(await reader.readline(), 16):
        got.append(json.loads(await reader.readexactly(size)))
        await reader.readexactly(2)
        if len(got) == lines:
            break
    writer.close()
    return status, got


def served(server, *questions):
    """All questions at the same time."""

    async def run():
        listener = await asyncio.start_server(server.answer, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        async with listener:
            answers = await asyncio.gather(*(ask(port, *question) for question in questions))
            while server.engine.busy:
                await asyncio.sleep(0.01)
            return answers

    return asyncio.run(run())


def generate(**fields):
    return "POST", "/generate", json.dumps(fields).encode()


def test_clients_get_the_tokens_of_their_prompts(server, rng):
    prompts = [rng.integers(0, TINY.vocab_size - 1, n).tolist() for n in (5, 12, 20)]
    texts = [" ".join(map(str, prompt)) for prompt in prompts]
    answers = served(
        server,
        generate(prompt=texts[0], max_new_tokens=9),
        generate(ids=prompts[1], max_new_tokens=7, num_samples=2),
        generate(prompt=texts[2], max_new_tokens=8, temperature=0.8, seed=4, top_p=0.9),
    )
    for (status, lines), prompt, samples in zip(answers, prompts, (1, 2, 1), strict=True):
        assert status == 200
        for index in range(samples):
            mine = [line for line in lines if line["index"] == index]
            ids = [i for line in mine for i in line["ids"]]
            assert "".join(line["text"] for line in mine) == Numbers().decode(ids)
            assert [line["reason"] for line in mine][-1] == ("stop" if ids[-1] == 96 else "length")
        if samples == 2:
            [one, other] = [[i for x in lines if x["index"] == j for i in x["ids"]] for j in (0, 1)]
            assert one == other
        del prompt
    [(_, again)] = served(server, generate(prompt=texts[0], max_new_tokens=9))
    assert [i for line in again for i in line["ids"]] == [i for line in answers[0][1] for i in line["ids"]]


def test_a_stop_text_ends_the_answer(server):
    [(_, lines)] = served(server, generate(prompt="1 2 3", max_new_tokens=12))
    ids = [i for line in lines for i in line["ids"]]
    [(_, lines)] = served(server, generate(prompt="1 2 3", max_new_tokens=12, stop=f"{ids[1]} "))
    assert len([i for line in lines for i in line["ids"]]) <= 2
    assert lines[-1]["reason"] == "stop"


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (("POST", "/generate", b"{"), "Expecting"),
        (("POST", "/generate", b"[]"), "JSON object"),
        (generate(), "either"),
        (generate(prompt="1", ids=[1]), "either"),
        (generate(prompt="1", volume=11), "unknown: volume"),
        (generate(prompt="1", temperature="hot"), "temperature: got 'hot'"),
        (generate(prompt="1", temperature=-1), "temperature: got -1"),
        (generate(ids=[1] * 60, max_new_tokens=9), "prompt: got 60 tokens"),
        (generate(ids=[]), "prompt: got"),
        (("GET", "/", b""), "there is"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_told(server, question, message):
    [(status, lines)] = served(server, question)
    assert status == 400
    assert message in lines[0]["error"]


def test_a_body_that_is_too_long_is_not_waited_for(server):
    async def run():
        listener = await asyncio.start_server(server.answer, "127.0.0.1", 0)
        async with listener:
            reader, writer = await asyncio.open_connection("127.0.0.1", listener.sockets[0].getsockname()[1])
            writer.write(f"POST /generate HTTP/1.1\r\nContent-Length: {2**24 + 1}\r\n\r\n".encode())
            answer = await reader.read()
            writer.close()
            return answer.decode()

    answer = asyncio.run(run())
    assert answer.startswith("HTTP/1.1 400 Bad Request")
    assert "more than 16777216 bytes" in answer


def test_who_hangs_up_cancels_the_request(server):
    [(_, lines)] = served(server, (*generate(prompt="1 2 3", max_new_tokens=60), 1))
    assert len(lines) == 1
    assert not server.engine._live
    [(status, [stats])] = served(server, ("GET", "/stats"))
    assert status == 200
    assert stats["running"] == stats["waiting"] == 0
    assert stats["num_free"] + stats["num_cached"] == stats["num_pages"] == 20
