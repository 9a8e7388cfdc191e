"""Continue prompts over HTTP: one engine, any number of clients, tokens as they come.

python scripts/serve.py --port 8000
curl -N localhost:8000/generate -d '{"prompt": "The capital of France is", "max_new_tokens": 20}'
curl localhost:8000/stats

POST /generate takes JSON: "prompt" (a text) or "ids", and any of max_new_tokens, min_new_tokens, temperature, top_k,
top_p, min_p, seed, stop (texts), repetition_penalty, presence_penalty, frequency_penalty, num_samples, priority. It
answers with a line of JSON for each group of tokens: {"index", "text", "ids", "reason"}. To hang up cancels it.
"""

import argparse
import asyncio
import json
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import paxattn
from models.load import load
from models.smollm2 import FetchError, cache_folder
from models.tokenizer import TextStream, Tokenizer

LARGEST = 2**24  # bytes of a request
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")
PARAMS = (
    "max_new_tokens", "min_new_tokens", "repetition_penalty", "presence_penalty", "frequency_penalty", "num_samples",
    "priority",
)  # fmt: skip


class BadRequestError(ValueError):
    """What a client sent cannot be served."""


@dataclass(frozen=True)
class Server:
    """An engine and the tokenizer of its model."""

    engine: paxattn.Engine
    tokenizer: Tokenizer

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request of one client."""
        try:
            method, path, body = await read_request(reader)
            if (method, path) == ("GET", "/stats"):
                await write_lines(writer, of_one(asdict(self.engine.stats())))
            elif (method, path) == ("POST", "/generate"):
                prompt, params = self.parse(body)
                await write_lines(writer, self.continued(prompt, params))
            else:
                raise BadRequestError("there is POST /generate and GET /stats")
        except ValueError as error:
            await write_lines(writer, of_one({"error": str(error)}), "400 Bad Request")
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has hung up
        finally:
            writer.close()

    def parse(self, body: bytes) -> tuple[list[int], paxattn.GenerationParams]:
        fields = json.loads(body)
        if not isinstance(fields, dict):
            raise BadRequestError("the body must be a JSON object")
        unknown = set(fields) - {"prompt", "ids", "stop", *SAMPLING, *PARAMS}
        if unknown:
            raise BadRequestError(f"unknown: {', '.join(sorted(unknown))}")
        if isinstance(fields.get("prompt"), str) == ("ids" in fields):
            raise BadRequestError('give either "prompt", a text, or "ids"')
        prompt = fields["ids"] if "ids" in fields else self.tokenizer.encode(fields["prompt"])
        stop = fields.get("stop", ())
        numbers: dict[str, Any] = {name: number(fields, name) for name in PARAMS if name in fields}
        params = paxattn.GenerationParams(
            sampling=paxattn.Sampling(**{name: number(fields, name) for name in SAMPLING if name in fields}),
            stop_ids=tuple(self.tokenizer.stop_ids),
            stop_strings=(stop,) if isinstance(stop, str) else tuple(stop),
            **numbers,
        )
        return prompt, params

    async def continued(self, prompt: list[int], params: paxattn.GenerationParams) -> AsyncGenerator[dict[str, Any]]:
        texts = [TextStream(self.tokenizer, prompt) for _ in range(params.num_samples)]
        async with aclosing(self.engine.stream(prompt, params)) as updates:
            async for update in updates:
                text = "".join(map(texts[update.index].put, update.ids))
                text += texts[update.index].end() if update.reason else ""
                yield {"index": update.index, "text": text, "ids": update.ids, "reason": update.reason}


def number(fields: dict[str, Any], name: str) -> int | float:
    value = fields[name]
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise BadRequestError(f"{name}: got {value!r}, must be a number")
    return value


async def read_request(reader: asyncio.StreamReader) -> tuple[str, str, bytes]:
    """Method, path and body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.split("\r\n")
    words = first.split()
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    length = headers.get("content-length", "0")
    if len(words) != 3 or not length.isdecimal() or int(length) > LARGEST:
        raise BadRequestError(f"not HTTP as it is spoken here, or more than {LARGEST} bytes")
    return words[0], words[1], await reader.readexactly(int(length))


async def of_one(line: Any) -> AsyncGenerator[Any]:
    yield line


async def write_lines(writer: asyncio.StreamWriter, lines: AsyncGenerator[Any], status: str = "200 OK") -> None:
    """JSON lines as they come, in chunks; the first line decides whether there will be any."""
    async with aclosing(lines):
        begun = False
        async for line in lines:
            if not begun:
                head = f"HTTP/1.1 {status}\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n"
                writer.write(f"{head}Connection: close\r\n\r\n".encode())
                begun = True
            data = json.dumps(line).encode() + b"\n"
            writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            await writer.drain()
    writer.write(b"0\r\n\r\n")
    await writer.drain()


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file or a Hugging Face folder (default: SmolLM2-135M)")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="restored from, or written on the first run")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU")
    parser.add_argument("--kv-dtype", choices=("float32", "bfloat16", "int8", "float8_e4m3fn"))
    parser.add_argument("--implementation", help="of attention: xla, mosaic_gpu, mosaic_tpu or reference")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-seqs", type=int, default=16)
    parser.add_argument("--max-len", type=int, default=2048)
    parser.add_argument("--num-pages", type=int, help="default: what the memory has room for")
    return parser


def new_server(options: argparse.Namespace) -> Server:
    default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    model, params, tokenizer = load(options.model, jnp.dtype(options.dtype or default), options.checkpoint)
    config = paxattn.EngineConfig(
        max_seqs=options.max_seqs,
        max_len=min(options.max_len, model.config.context),
        num_pages=options.num_pages or "auto",
        kv_dtype=options.kv_dtype,
        implementation=options.implementation,
        max_stop_ids=max(1, len(tokenizer.stop_ids)),
    )
    text: Callable[[list[int]], str] = tokenizer.decode
    return Server(paxattn.Engine(model, params, config, detokenize=text), tokenizer)


async def listen(server: Server, host: str, port: int) -> None:
    listener = await asyncio.start_server(server.answer, host, port)
    print(f"listening on {host}:{listener.sockets[0].getsockname()[1]}", flush=True)
    async with listener:
        await listener.serve_forever()


def main() -> None:
    os.environ.setdefault("XLA_FLAGS", paxattn.XLA_FLAGS)
    parser = arguments()
    options = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    try:
        server = new_server(options)
        server.engine.warmup(lambda done, total: print(f"compiled {done} of {total} programs", flush=True))
        asyncio.run(listen(server, options.host, options.port))
    except KeyboardInterrupt:
        pass
    except (ValueError, NotImplementedError, FetchError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
