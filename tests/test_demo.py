"""The bundled model answers its questions as they were written, in every way the engine can be asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH

ROOT = Path(__file__).parent.parent
QUESTIONS = json.loads((Path(DEMO_MODEL_PATH) / "questions.json").read_text(encoding="utf-8"))
ANSWERS = {pair["question"]: pair["answer"] for pair in QUESTIONS}
GREEDY = SamplingParams(temperature=0, max_tokens=512)


def ask(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


@pytest.fixture(scope="module")
def llm():
    with LLM(DEMO_MODEL_PATH, device="cpu") as llm:
        yield llm
        llm.scheduler.check_integrity()
        assert llm.scheduler.placement.decode_card.block_manager.num_held_blocks == 0


def test_every_answer_equals_the_written_one(llm):
    assert len(QUESTIONS) >= 300
    answers = llm.chat([ask(pair["question"]) for pair in QUESTIONS], GREEDY, use_tqdm=False)
    wrong = [p["question"] for p, a in zip(QUESTIONS, answers, strict=True) if a["text"] != p["answer"]]
    assert not wrong
    assert {answer["finish_reason"] for answer in answers} == {"stop"}


def test_answers_in_bfloat16_under_chunks_and_preemption():
    questions = list(ANSWERS)[:24]
    options = {"dtype": "bfloat16", "num_kvcache_blocks": 20, "max_num_batched_tokens": 48}
    with LLM(DEMO_MODEL_PATH, device="cpu", **options) as llm:
        answers = llm.chat([ask(question) for question in questions], GREEDY, use_tqdm=False)
        assert llm.scheduler.num_preemptions > 0
    assert [answer["text"] for answer in answers] == [ANSWERS[question] for question in questions]


def test_the_checkpoint_is_small_and_its_questions_are_those_it_was_trained_on():
    size = sum(file.stat().st_size for file in Path(DEMO_MODEL_PATH).iterdir() if file.is_file())
    assert size <= 8 * 1024**2
    trained = (ROOT / "tools" / "demo_questions.json").read_text(encoding="utf-8")
    assert json.loads(trained) == QUESTIONS


@pytest.mark.parametrize("question", ["What is the capital of France?", "How do you say hello in Chinese?"])
def test_streamed_pieces_make_up_the_answer(llm, question):
    prompt = llm.tokenizer.apply_chat_template(ask(question), tokenize=False, add_generation_prompt=True)
    pieces = list(llm.generate_stream(prompt, GREEDY))
    assert len(pieces) > 2
    assert "".join(piece.text for piece in pieces) == ANSWERS[question]
    assert [piece.finished for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all("�" not in piece.text for piece in pieces)


def test_stop_strings_end_the_text_before_them_and_never_show(llm):
    answer = ANSWERS["list all prime numbers within 100"]
    stop = "37"
    expected = answer[: answer.index(stop)]
    params = SamplingParams(temperature=0, max_tokens=512, stop=["no such text", stop])
    whole = llm.chat(ask("list all prime numbers within 100"), params, use_tqdm=False)[0]
    assert whole["text"] == expected
    assert whole["finish_reason"] == "stop"
    prompt = llm.tokenizer.apply_chat_template(
        ask("list all prime numbers within 100"), tokenize=False, add_generation_prompt=True
    )
    shown = ""
    for piece in llm.generate_stream(prompt, params):
        shown += piece.text
        assert expected.startswith(shown)
    assert shown == expected


def test_a_stop_string_is_not_heeded_before_min_tokens(llm):
    question = "list all prime numbers within 100"
    params = SamplingParams(temperature=0, max_tokens=512, stop="2", min_tokens=40)
    answer = llm.chat(ask(question), params, use_tqdm=False)[0]
    assert len(answer["token_ids"]) >= 40
    assert ANSWERS[question].startswith(answer["text"])


def test_ignore_eos_and_the_several_eos_tokens_of_generation_config(llm):
    eos = json.loads((Path(DEMO_MODEL_PATH) / "generation_config.json").read_text())["eos_token_id"]
    assert len(eos) > 1
    assert llm._intake.eos_ids == set(eos)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    answer = llm.chat(ask("What is the capital of France?"), params, use_tqdm=False)[0]
    assert answer["finish_reason"] == "length"
    assert len(answer["token_ids"]) == 60


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--model", DEMO_MODEL_PATH]])
def test_example_runs(arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "example.py"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    for question in ("introduce yourself", "list all prime numbers within 100"):
        assert ANSWERS[question] in run.stdout
    assert len((ROOT / "example.py").read_text().splitlines()) < 40


def test_text_from_before_min_tokens_does_not_stop(llm):
    question = "list all prime numbers within 100"
    whole = llm.chat(ask(question), GREEDY, use_tqdm=False)[0]
    early = ANSWERS[question][:5]
    params = SamplingParams(temperature=0, max_tokens=512, stop=[early, "x" * 200], min_tokens=6)
    answer = llm.chat(ask(question), params, use_tqdm=False)[0]
    assert answer["token_ids"] == whole["token_ids"]
