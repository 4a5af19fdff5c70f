"""The server on loopback as a user starts it (compiled, several processes); OpenAI clients send videos."""

import base64
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engines import ENVIRONMENT, TOLERANCE, Family, tokens_per_round, wanted

#: The engine has a process of its own here.
OWN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "NO_PROXY": "127.0.0.1", "VLLM_LOGGING_LEVEL": "INFO"}
START_SECONDS = 900
#: vLLM's own loader for Qwen takes 768 frames at most.
ALL_FRAMES = {"video_backend": "opencv", "num_frames": -1}


class Server:
    def __init__(self, address: str, family: Family):
        from openai import OpenAI
        from transformers import AutoTokenizer

        self.address, self.family = address, family
        self.client = OpenAI(base_url=f"{address}/v1", api_key="none", timeout=600)
        self.tokenizer = AutoTokenizer.from_pretrained(family.target)

    def ask(self, clip: dict[str, Any], stream: bool = False) -> str:
        """The answer to a clip, read to its last frame."""
        video = base64.b64encode((self.family.folder / f"{clip['name']}.mp4").read_bytes()).decode()
        content = [
            {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{video}"}},
            {"type": "text", "text": clip["text"]},
        ]
        answer = self.client.chat.completions.create(
            model=self.family.target,
            messages=[{"role": "user", "content": content}],
            temperature=0,
            max_tokens=100,
            stream=stream,
            extra_body={"media_io_kwargs": {"video": ALL_FRAMES}} if clip["visual_tokens"] > 400 else {},
        )
        if stream:
            return "".join(part.choices[0].delta.content or "" for part in answer if part.choices)
        return answer.choices[0].message.content

    def expected(self, clip: dict[str, Any]) -> str:
        """What transformers said. vLLM decodes word by word, each with the space before it, the first one too."""
        return " " + self.tokenizer.decode(clip["vllm"]["ids"], skip_special_tokens=True)

    def rounds(self) -> float:
        """Rounds so far."""
        page = urllib.request.urlopen(f"{self.address}/metrics").read().decode()
        return float(re.search(r"^vllm:spec_decode_num_drafts_total\S* (\S+)$", page, re.M)[1])


@pytest.fixture(scope="module")
def server(qwen: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(Path(sys.executable).with_name("vllm"), "serve", qwen.target),
        *("--host", "127.0.0.1", "--port", port),
        *("--speculative-config", json.dumps(qwen.speculative_config())),
        *("--dtype", "float32", "--max-model-len", 8192, "--max-num-seqs", 8, "--skip-mm-profiling"),
        # A video has to fit into one batch as a whole.
        *("--max-num-batched-tokens", 8192, "--trust-request-mm-kwargs"),
        # All frames of short clips, which have 8 a second.
        *("--media-io-kwargs", json.dumps({"video": {"fps": 8}})),
    ]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT | OWN_PROCESS,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(START_SECONDS):
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        yield Server(address, qwen)
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize(("visual_tokens", "stream"), [(400, False), (400, True), (3200, False)])
def test_an_answer_is_transformers_text(qwen: Family, server: Server, visual_tokens: int, stream: bool) -> None:
    clip = qwen.of_length(visual_tokens)[0]
    assert server.ask(clip, stream) == server.expected(clip)


def test_eight_clients_at_once(qwen: Family, server: Server) -> None:
    clips = (qwen.of_length(400) * 2)[:6] + qwen.of_length(3200)[:2]
    before = server.rounds()
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(server.ask, clips))
    rounds = server.rounds() - before
    assert answers == [server.expected(clip) for clip in clips]
    found = tokens_per_round([clip["vllm"]["ids"] for clip in clips], rounds)
    print(f"acceptance length {found:.2f}, in transformers {wanted(clips, 'vllm'):.2f}")
    assert found == pytest.approx(wanted(clips, "vllm"), rel=TOLERANCE)
