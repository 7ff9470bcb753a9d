"""`vllm serve`: an OpenAI-compatible server that answers about an image."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from helpers.served_bases import base
from helpers.served_models import save_student

from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.restore import load

SECONDS = 300  # to start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_student(
        tmp_path_factory.mktemp("student"), VisionSchedule(enter=0, exit=11), base("embedded")
    )


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "4", "--block-size", "32"]
    environment = {n: v for n, v in os.environ.items() if n != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    log = tmp_path_factory.mktemp("log") / "server.txt"
    with log.open("w") as output:
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "vllm.entrypoints.cli.main",
                "serve",
                folder,
                "--port",
                str(port),
                *options,
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + SECONDS
        while not answers(f"{address}/health"):
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
            time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait(30)


def answers(address):
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except OSError:
        return False


def data_address(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def answer_of(address, folder, question, picture):
    image = {"type": "image_url", "image_url": {"url": data_address(picture)}}
    body = {
        "model": folder,
        "messages": [{"role": "user", "content": [image, {"type": "text", "text": question}]}],
        "temperature": 0,
        "max_tokens": 6,
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    reply = json.load(urllib.request.urlopen(request, timeout=120))
    return reply["choices"][0]["message"]["content"]


def test_a_server_answers_about_images_as_the_executor_does(address, folder):
    model, processor = load(folder, dtype=torch.float32)
    picture, answered = base("embedded").picture(3), set()
    for question in ("how many squares are there?", "what color is the circle?", "is there a red square?"):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(text=text, images=picture, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        expected = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer_of(address, folder, question, picture).strip() == expected.strip()
        answered.add(expected)
    assert len(answered) > 1
