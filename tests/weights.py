"""A real model, SmolLM2-135M-Instruct: conversations, a text, and what transformers answers in float32."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanovllm import LLM, SamplingParams

MAX_TOKENS = 40
GUIDE = {
    "role": "system",
    "content": "You are the guide of a small museum of clocks. Answer in one or two short sentences, and be polite.",
}
"""Shared by several conversations, so that they share blocks of KV."""

RECORD = (
    "The village lies where the river leaves the hills. In spring the water is high and brown, and children are told "
    "to stay away from it; in August one can walk across on the stones. There is one shop, which sells bread, string, "
    "stamps and paraffin, and which is closed on Wednesdays for no reason that anyone remembers. The school has two "
    "rooms and nineteen pupils. "
)


def said(content: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": content}


CHATS: list[list[dict[str, str]]] = [
    [said("What is the capital of France?")],
    [said("Who are you?")],
    [said("Name three colours of the rainbow.")],
    [said("Write a short poem about the sea.")],
    [said("What is 12 + 7?")],
    [said("Explain in one sentence why the sky is blue.")],
    [said("Translate 'good morning' into Spanish.")],
    [said("Give me a recipe for pancakes.")],
    [said("Write a Python function that adds two numbers.")],
    [said("What do bees make?")],
    [GUIDE, said("When was the pendulum clock invented?")],
    [GUIDE, said("Is the museum open on Mondays?")],
    [GUIDE, said("May I take photographs?")],
    [said("My name is Ada."), said("Nice to meet you, Ada!", "assistant"), said("What is my name?")],
    [said("List the planets."), said("Mercury, Venus, Earth, Mars.", "assistant"), said("Go on.")],
    [said(RECORD + "How many pupils has the school?")],
    [said(RECORD * 3 + "On which day is the shop closed?")],
    [said("¿Dónde está la biblioteca? 📚 Answer in English.")],
    [said("Is water wet? Answer with yes or no.")],
    [said("Say hello.")],
]
"""Written down once, before any answer was seen; none was exchanged afterwards."""

TEXT = (
    "The lighthouse keeper wrote a line in his book every evening. Mostly it was about the weather: wind from the "
    "west, rain until noon, fog that did not lift before three. Once a month a boat came with coal, flour and "
    "letters, and on that day he wrote a little more. He noted who had brought the boat, what had been broken on the "
    "way, and what people in the harbour were saying about the price of fish. When he retired, after thirty-one "
    "years, he gave the books to the library of the town. Nobody asked for them until a student came who wanted to "
    "know how often there had been storms in winter. She read all of them, from the first page to the last, and found "
    "that the number of storms had hardly changed. What had changed was the way in which he described them. In the "
    "first years he used long words and compared the waves to mountains. Later he gave only the hour and the strength "
    "of the wind. In the last book, on a night when the sea broke two windows and put out the light, he wrote: "
    '"Loud. Slept badly. Will need glass." The student said that she had never read a better account of a storm.'
)
"""Fixed English text of some 250 tokens, written for this test."""


@dataclass(frozen=True)
class Reference:
    """What transformers says in float32.

    Attributes:
        answers: greedy tokens for each of `CHATS`, the end-of-sequence token included.
        smallest_gap: between the two largest logits, over all tokens of the answers.
        text_ids: the tokens of `TEXT`.
        logprobs: [len(text_ids) - 1] float64 log-probability of each token after the first.
    """

    answers: list[list[int]]
    smallest_gap: float
    text_ids: list[int]
    logprobs: torch.Tensor


def load_reference(folder: Path, device: str = "cpu") -> Any:
    """The model of transformers, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)


@torch.inference_mode()
def reference_of(folder: Path) -> Reference:
    model, tokenizer = load_reference(folder), AutoTokenizer.from_pretrained(folder)
    answers, smallest_gap = [], math.inf
    for chat in CHATS:
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made = model.generate(
            **prompt, max_new_tokens=MAX_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        answers.append(made.sequences[0, prompt["input_ids"].shape[1] :].tolist())
        largest = torch.cat(made.logits).topk(2).values
        smallest_gap = min(smallest_gap, float((largest[:, 0] - largest[:, 1]).min()))
    text_ids = tokenizer(TEXT).input_ids
    logprobs = text_logprobs(model, text_ids)
    del model
    gc.collect()  # the tests that follow hold up to two more copies of the weights
    return Reference(answers, smallest_gap, text_ids, logprobs)


@torch.inference_mode()
def text_logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """[len(ids) - 1] float64 log-probability of each token after those before it, by a model of transformers."""
    logits = model(torch.tensor([ids], device=model.device)).logits[0, :-1]
    return logprobs_of(logits, torch.tensor(ids[1:], device=model.device)).cpu()


def logprobs_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[N] log-probability of one token for each row of logits [N, V].

    The softmax is in float64: in float32 the sum over the vocabulary alone is off by 1e-5 for each token.
    """
    return logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def sampled_perplexities(llm: LLM, reference: Any) -> tuple[float, float]:
    """Perplexity of what an engine samples for `CHATS`: by itself, as it reports, and by a model of transformers."""
    params = [SamplingParams(temperature=1, seed=i, max_tokens=128, logprobs=0) for i in range(len(CHATS))]
    prompts = [llm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in CHATS]
    prompt_ids = [llm.tokenizer(prompt).input_ids for prompt in prompts]
    own, theirs = [], []
    for ids, answer in zip(prompt_ids, llm.generate(prompt_ids, params, use_tqdm=False), strict=True):
        own += [of_token.logprob for of_token in answer["logprobs"]]
        theirs.append(text_logprobs(reference, ids + answer["token_ids"])[len(ids) - 1 :])
    assert len(own) == sum(map(len, theirs)) > 1000
    return math.exp(-sum(own) / len(own)), math.exp(-float(torch.cat(theirs).mean()))
