"""The chat template, and `scripts/serve.py` as a process of its own, asked by HTTP; what continuous batching does."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import torch
from transformers import (
    AutoTokenizer,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    pipeline,
)

from modeling_alrd_llama import ALRDLlamaForCausalLM
from scripts import serve
from scripts.common import latent_config, load_model
from scripts.corpus import Document
from scripts.train_small_model import CHAT_TEMPLATE, train_tokenizer
from tests.helpers import tiny_split

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = str(ROOT / "models" / "tiny-python-llama")
START_SECONDS, REQUEST_SECONDS, NEW_TOKENS = 180, 120, 24

SYSTEM = {"role": "system", "content": "Tools that read and write text files, line by line, and count their words."}
KEEP = {"role": "user", "content": "A class that keeps the lines of many files, and forgets the oldest of them."}
READ = {"role": "user", "content": "A function that opens the file of this path,\nand returns a list of its lines."}
REPLY = {"role": "assistant", "content": "import os\n\n\ndef read_lines(path):\n    return open(path).readlines()"}
CONVERSATIONS = ([SYSTEM, KEEP], [SYSTEM, READ, REPLY, KEEP], [KEEP, REPLY, READ])
PROMPT = '''"""Parse the headers of a message."""

import re
import sys

class HeaderParser:
    def __init__(self, message):
        self.message = message
        self.headers = {}

    def parse(self):
        for line in self.message.splitlines():
'''


# ---- the model and what it answers in this process


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """The bundled model split by plain SVD, its cache of 2 bits, as a folder to serve."""
    folder = tmp_path_factory.mktemp("served")
    config, _ = latent_config(BUNDLED, 0.5)
    config.k_bits = config.v_bits = 2
    config.residual_length, config.group_size = 16, 32
    model, tokenizer = load_model(BUNDLED, "float32", config=config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Local:
    """A split model in this process: the answers that the server must give."""

    def __init__(self, folder: str):
        self.model = ALRDLlamaForCausalLM.from_pretrained(folder, dtype="auto").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.answers: dict[tuple[str, bool], str] = {}

    def ids(self, messages: list[dict] | str) -> torch.Tensor:
        if isinstance(messages, str):
            return self.tokenizer(messages, return_tensors="pt").input_ids
        how = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        return self.tokenizer.apply_chat_template(messages, **how)["input_ids"]

    def answer(self, messages: list[dict] | str, dense: bool = False) -> str:
        """Greedy answer through a cache that has packed something, or through a `DynamicCache`."""
        key = (json.dumps(messages), dense)
        if key not in self.answers:
            ids = self.ids(messages)
            cache = DynamicCache() if dense else self.model.create_kivi_cache()
            given = {"attention_mask": torch.ones_like(ids), "past_key_values": cache}
            tokens = self.model.generate(ids, **given, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
            assert len(tokens) == NEW_TOKENS  # none of the texts here ends early
            assert dense or all(row.blocks for layer in cache.layers for row in layer.rows)
            self.answers[key] = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return self.answers[key]


@pytest.fixture(scope="module")
def local(checkpoint) -> Local:
    return Local(checkpoint)


# ---- the process


@contextmanager
def running_server(folder: str, log: Path, *options: str):
    """The address of a server of its own, which has ended when the block is left."""
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), folder, "--device", "cpu", "--host", "127.0.0.1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", "0", *options], stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (found := re.search(r"running on (http://[\d.:]+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"no answer after {START_SECONDS} s: {log.read_text()}"
            time.sleep(0.1)
        yield found[1]
        assert process.poll() is None, f"the server has died: {log.read_text()}"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    with running_server(checkpoint, tmp_path_factory.mktemp("log") / "server.log") as address:
        yield address


def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=REQUEST_SECONDS, max_retries=0)


def post(address: str, path: str, body: dict | bytes) -> tuple[int, str]:
    """Status and text of the answer to a plain HTTP request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def chat(address: str, model: str, messages: list[dict], **options) -> str:
    """The assistant's answer, checked for what comes with it."""
    answer = client(address).chat.completions.create(
        model=model, messages=messages, max_tokens=NEW_TOKENS, temperature=0, **options
    )
    assert answer.usage.completion_tokens == NEW_TOKENS
    assert answer.choices[0].finish_reason == "length"
    return answer.choices[0].message.content


def stream(address: str, model: str, messages: list[dict]) -> list[str]:
    """The pieces of a streamed answer."""
    chunks = client(address).chat.completions.create(
        model=model, messages=messages, max_tokens=NEW_TOKENS, temperature=0, stream=True
    )
    return [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]


# ---- chat template


def test_the_chat_template_writes_a_conversation_as_a_python_file():
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    assert Path(BUNDLED, "chat_template.jinja").read_text() == CHAT_TEMPLATE
    messages = [
        {"role": "system", "content": "Text files."},
        {"role": "user", "content": "Read a file.\nReturn its lines."},
        {"role": "assistant", "content": "def read(path):\n    return open(path).readlines()"},
        {"role": "user", "content": " Count them.\n"},
    ]
    text = (
        '<|endoftext|>"""Text files."""\n\n\n"""Read a file.\nReturn its lines."""\n\n\n'
        'def read(path):\n    return open(path).readlines()\n\n\n"""Count them."""\n\n\n'
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids == tokenizer(text.removeprefix("<|endoftext|>")).input_ids  # one token begins the text
    # What was said is the beginning of all that is said later.
    for n in (1, 2, 3):
        assert text.startswith(tokenizer.apply_chat_template(messages[:n], tokenize=False))
    with pytest.raises(Exception, match="role tool: must be system, user or assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "1"}], tokenize=False)


def test_retraining_keeps_the_chat_template():
    tokenizer = train_tokenizer([Document("one", "def f():\n    return 1\n")])
    assert tokenizer.apply_chat_template([SYSTEM], tokenize=False).startswith('<|endoftext|>"""Tools that read')


def test_a_pipeline_takes_chat_messages(local):
    generate = pipeline("text-generation", model=local.model, tokenizer=local.tokenizer)
    messages = CONVERSATIONS[1]
    replied = generate(messages, max_new_tokens=NEW_TOKENS, do_sample=False)[0]["generated_text"]
    assert replied[:-1] == messages
    assert replied[-1] == {"role": "assistant", "content": local.answer(messages)}


# ---- the server


def test_models_lists_what_is_served(server, checkpoint):
    assert [model.id for model in client(server).models.list()] == [checkpoint]


def test_a_chat_of_two_turns_goes_through_the_packed_cache(server, checkpoint, local):
    messages = [SYSTEM, KEEP]
    first = chat(server, checkpoint, messages)
    assert first == local.answer(messages)
    messages = [*messages, {"role": "assistant", "content": first}, READ]
    second = chat(server, checkpoint, messages)
    assert second == local.answer(messages)
    # Two bits change the answers, so they cannot have come through a cache of dense keys and values.
    assert first != local.answer([SYSTEM, KEEP], dense=True)
    # Nothing of a request is left in the next one.
    assert chat(server, checkpoint, [SYSTEM, KEEP]) == first


def test_a_chat_is_streamed(server, checkpoint, local):
    messages = [SYSTEM, KEEP]
    pieces = stream(server, checkpoint, messages)
    assert len(pieces) > NEW_TOKENS // 2
    assert "".join(pieces) == local.answer(messages)


def test_the_stream_is_server_sent_events(server, local):
    body = {"messages": [SYSTEM, KEEP], "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True}
    status, text = post(server, "/v1/chat/completions", body)
    assert status == 200
    *events, end = text.split("\n\n")
    assert end == "" and all(event.startswith("data: ") for event in events)
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert choices[0]["delta"] == {"role": "assistant"}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == local.answer([SYSTEM, KEEP])
    assert choices[-1]["finish_reason"] == "length"


def test_a_completion_goes_on_with_code(server, checkpoint, local):
    options = {"model": checkpoint, "prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0}
    assert client(server).completions.create(**options).choices[0].text == local.answer(PROMPT)


def test_requests_at_once_do_not_meet(server, checkpoint, local):
    expected = [local.answer(messages) for messages in CONVERSATIONS]
    assert len(set(expected)) == len(expected)
    with ThreadPoolExecutor(3) as pool:
        streamed = pool.submit(stream, server, checkpoint, CONVERSATIONS[0])
        whole = [pool.submit(chat, server, checkpoint, messages) for messages in CONVERSATIONS[1:]]
        answers = ["".join(streamed.result(REQUEST_SECONDS)), *(job.result(REQUEST_SECONDS) for job in whole)]
    assert answers == expected


def test_a_reader_who_leaves_ends_the_answer(server, checkpoint, local):
    options = {"messages": [SYSTEM, KEEP], "max_tokens": 1500, "temperature": 0, "stream": True}
    with client(server).chat.completions.create(model=checkpoint, **options) as chunks:
        next(iter(chunks))
    # Fifteen hundred tokens would take minutes.
    assert chat(server, checkpoint, [SYSTEM, KEEP]) == local.answer([SYSTEM, KEEP])


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 422, "json_invalid"),
        ({"messages": [KEEP], "colour": "red"}, 422, "Unexpected fields in the request: {'colour'}"),
        ({"messages": [KEEP], "model": "other"}, 400, "requested 'other'"),
        ({"messages": [{"role": "tool", "content": "1"}]}, 500, "Internal Server Error"),
    ],
)
def test_a_bad_request_is_refused_and_the_server_lives(server, local, body, status, message):
    got, text = post(server, "/v1/chat/completions", body)
    assert got == status and message in text
    body = {"messages": [SYSTEM, KEEP], "max_tokens": NEW_TOKENS, "temperature": 0}
    status, text = post(server, "/v1/chat/completions", body)
    assert status == 200
    assert json.loads(text)["choices"][0]["message"]["content"] == local.answer([SYSTEM, KEEP])


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="a LlamaForCausalLM, must be a split checkpoint"):
        serve.LatentModelManager(device="cpu", force_model=BUNDLED)


def test_compile_is_refused(checkpoint):
    with pytest.raises(SystemExit, match="--compile: must not be given"):
        serve.main([checkpoint, "--compile"])


# ---- continuous batching


PAGES = {"num_blocks": 32, "max_batch_tokens": 64}


def generate_batch(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    results = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=30, do_sample=False, eos_token_id=96, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(**PAGES),
    )
    assert [result.error for result in results.values()] == [None] * len(prompts)
    return [result.generated_tokens for result in results.values()]


@pytest.mark.parametrize(("use_kivi", "attention"), [(True, "sdpa"), (True, "eager"), (False, "sdpa")])
def test_continuous_batching_attends_to_dense_pages(tmp_path, use_kivi, attention, recwarn):
    """The tokens are those of the same factors with a `DynamicCache`, and a warning says that nothing is packed."""
    fields = {"use_kivi": use_kivi, "residual_length": 8, "group_size": 8, "k_bits": 2, "v_bits": 2}
    model = tiny_split(tmp_path, {"k_proj": 24, "v_proj": 40}, **fields)
    model.set_attn_implementation(attention)
    prompts = [torch.randint(1, 96, (n,)).tolist() for n in (5, 37, 70, 3)]

    def alone(ids: list[int], cache) -> list[int]:
        given = {"attention_mask": torch.ones(1, len(ids)), "past_key_values": cache, "eos_token_id": 96}
        return model.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False, **given)[0, len(ids) :].tolist()

    packed = [alone(ids, None) for ids in prompts]
    recwarn.clear()
    assert generate_batch(model, prompts) == [alone(ids, DynamicCache()) for ids in prompts]
    warned = [str(w.message) for w in recwarn if "continuous batching" in str(w.message)]
    assert len(warned) == use_kivi
    # Afterwards the model answers through its own cache as before.
    assert [alone(ids, None) for ids in prompts] == packed
    assert (packed == [alone(ids, DynamicCache()) for ids in prompts]) != use_kivi


def test_a_server_with_continuous_batching(checkpoint, local, tmp_path):
    pages = [f"--cb-{name.replace('_', '-')}={value}" for name, value in PAGES.items()]
    log = tmp_path / "server.log"
    with running_server(checkpoint, log, "--continuous-batching", *pages) as server, ThreadPoolExecutor(3) as pool:
        streamed = pool.submit(stream, server, checkpoint, CONVERSATIONS[0])
        whole = [pool.submit(chat, server, checkpoint, messages) for messages in CONVERSATIONS[1:]]
        answers = ["".join(streamed.result(REQUEST_SECONDS)), *(job.result(REQUEST_SECONDS) for job in whole)]
    assert answers == [local.answer(messages, dense=True) for messages in CONVERSATIONS]
    assert "keys and values lie dense in the library's pages" in log.read_text()
