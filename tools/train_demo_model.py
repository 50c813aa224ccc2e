"""Train the bundled demo model: a tiny Qwen3 checkpoint that knows the pairs of demo_questions.json by heart.

Writes an ordinary Hugging Face checkpoint and a copy of the questions to --output. The exit status is 0 only if the
saved files, loaded again, give back every answer token for token with greedy decoding, in float32 and in bfloat16.
Runs on CPU in minutes. The same seed, thread count, CPU type and library versions give the same weights.
"""

import argparse
import json
import math
import random
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy, one_hot
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ROOT = Path(__file__).resolve().parent.parent

VOCAB_SIZE = 1536
MAX_LENGTH = 2048
END_OF_TEXT = "<|endoftext|>"
MESSAGE_START = "<|im_start|>"
MESSAGE_END = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TOKENS_PER_BATCH = 1024
PEAK_LEARNING_RATE = 2e-3
WARMUP_SHARE = 0.05
WEIGHT_DECAY = 0.1
# The loss asks for a lead of this size over the other tokens; the saved weights must keep at least REQUIRED_LEAD of
# it. The difference absorbs rounding to bfloat16 and the summation order of other kernels and devices.
TRAINED_LEAD = 6.0
REQUIRED_LEAD = 1.0
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One question in the chat template and its answer with the end marker, as token ids."""

    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def train_tokenizer(pairs: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary from the pairs; any text can be encoded and decoded without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, MESSAGE_START, MESSAGE_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for pair in pairs for text in pair.values()), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=MESSAGE_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    tokenizer.save_pretrained(output)
    # transformers 5 writes a class name that version 4 does not know; both know this one.
    path = output / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def respell(pairs: list[dict[str, str]]) -> Iterator[list[dict[str, str]]]:
    """Yield the pairs with the spellings of the questions that people are likely to type instead."""
    for spell in (str.lower, lambda text: text.rstrip(" .?!"), lambda text: text.lower().rstrip(" .?!")):
        yield [{**pair, "question": spell(pair["question"])} for pair in pairs]


def encode(pairs: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    examples = []
    for pair in pairs:
        messages = [{"role": "user", "content": pair["question"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        answer = [*tokenizer.encode(pair["answer"]), tokenizer.eos_token_id]
        if tokenizer.decode(answer, skip_special_tokens=True) != pair["answer"]:
            raise ValueError(f"the tokenizer does not give back the answer to {pair['question']!r}")
        examples.append(Example(tokenizer.encode(prompt), answer))
    return examples


def build_model(tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    stop_ids = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_LENGTH,
        max_window_layers=4,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id
    )
    return model


def pad(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and, for each position, the answer token it must predict (or IGNORED).

    Padding is on the right, where causal attention hides it from the real tokens, so no attention mask is needed.
    """
    width = max(map(len, examples))
    inputs = torch.zeros(len(examples), width, dtype=torch.long)
    targets = torch.full_like(inputs, IGNORED)
    for row, example in enumerate(examples):
        inputs[row, : len(example)] = torch.tensor(example.prompt + example.answer)
        targets[row, len(example.prompt) - 1 : len(example) - 1] = torch.tensor(example.answer)
    return inputs, targets


def batches(examples: list[Example], rng: random.Random | None = None) -> Iterator[list[Example]]:
    """Group examples of similar length; with `rng`, in a different grouping and order each time."""
    jitter = {id(example): rng.uniform(0.8, 1.25) if rng else 1.0 for example in examples}
    groups: list[list[Example]] = [[]]
    for example in sorted(examples, key=lambda example: len(example) * jitter[id(example)]):
        width = max(map(len, [*groups[-1], example]))
        if groups[-1] and width * (len(groups[-1]) + 1) > TOKENS_PER_BATCH:
            groups.append([])
        groups[-1].append(example)
    if rng:
        rng.shuffle(groups)
    yield from groups


def margin_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with a handicap on the right token, so that training goes on until it leads clearly."""
    handicap = TRAINED_LEAD * one_hot(targets, logits.shape[-1])
    return cross_entropy(logits - handicap, targets)


def make_optimizer(model: Qwen3ForCausalLM) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    norms = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98))


def learning_rate_factor(progress: float) -> float:
    """Linear warmup, then a cosine down to zero; `progress` runs from 0 to 1."""
    if progress < WARMUP_SHARE:
        return progress / WARMUP_SHARE
    return 0.5 * (1.0 + math.cos(math.pi * (progress - WARMUP_SHARE) / (1.0 - WARMUP_SHARE)))


def train(
    model: Qwen3ForCausalLM, examples: list[Example], respelled: list[list[Example]], epochs: int, seed: int
) -> None:
    """Train on all examples once per epoch, each time as written or, as often, in one of the other spellings."""
    rng = random.Random(seed)
    optimizer = make_optimizer(model)
    start = time.perf_counter()
    model.train()
    for epoch in range(epochs):
        losses = []
        chosen = [
            rng.choice([written, rng.choice(others)]) for written, *others in zip(examples, *respelled, strict=True)
        ]
        groups = list(batches(chosen, rng))
        for step, group in enumerate(groups):
            progress = (epoch + (step + 1) / len(groups)) / epochs
            for param_group in optimizer.param_groups:
                param_group["lr"] = PEAK_LEARNING_RATE * learning_rate_factor(progress)
            inputs, targets = pad(group)
            wanted = targets != IGNORED
            loss = margin_loss(model(inputs, use_cache=False).logits[wanted], targets[wanted])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1:3}/{epochs}  loss {sum(losses) / len(losses):8.4f}  {seconds:5.0f} s", flush=True)
    model.eval()


def save(model: Qwen3ForCausalLM, questions: Path, output: Path) -> None:
    model.bfloat16().save_pretrained(output)
    # The weights are written through a private temporary file and would otherwise be readable by their owner only.
    (output / "model.safetensors").chmod(0o644)
    target = output / "questions.json"
    if questions.resolve() != target.resolve():
        shutil.copyfile(questions, target)


@torch.inference_mode()
def smallest_lead(model: Qwen3ForCausalLM, examples: list[Example]) -> float:
    """Smallest lead of the right token's logit over the second best, over all answer positions (negative: wrong)."""
    smallest = math.inf
    for group in batches(examples):
        inputs, targets = pad(group)
        wanted = targets != IGNORED
        logits = model(inputs, use_cache=False).logits[wanted].float()
        right = targets[wanted].unsqueeze(-1)
        leads = logits.gather(-1, right) - logits.scatter(-1, right, -math.inf).max(-1, keepdim=True).values
        smallest = min(smallest, leads.min().item())
    return smallest


@torch.inference_mode()
def count_exact_answers(model: Qwen3ForCausalLM, examples: list[Example]) -> int:
    """Generate all answers greedily and count those that equal the written ones token for token."""
    # Prompts of one length need no padding, so a batch computes what each request alone would compute.
    by_length = defaultdict(list)
    for example in examples:
        by_length[len(example.prompt)].append(example)
    exact = 0
    for group in by_length.values():
        prompts = torch.tensor([example.prompt for example in group])
        longest = max(len(example.answer) for example in group)
        outputs = model.generate(  # type: ignore[misc]  # transformers annotates self with a protocol
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=longest, do_sample=False
        )
        for example, output in zip(group, outputs[:, prompts.shape[1] :].tolist(), strict=True):
            exact += output[: len(example.answer)] == example.answer
    return exact


def verify(output: Path, pairs: list[dict[str, str]]) -> bool:
    """Load the saved checkpoint as any user would and check every answer in both precisions."""
    examples = encode(pairs, AutoTokenizer.from_pretrained(output))
    good = True
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(output, dtype=dtype).eval()
        lead = smallest_lead(model, examples)
        exact = count_exact_answers(model, examples)
        print(f"{dtype}: {exact} of {len(examples)} answers exact, smallest lead {lead:.3f}", flush=True)
        good = good and exact == len(examples) and lead >= REQUIRED_LEAD
    return good


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "nanovllm" / "demo", help="folder for the checkpoint")
    parser.add_argument("--questions", type=Path, default=Path(__file__).with_name("demo_questions.json"))
    parser.add_argument("--epochs", type=int, default=70)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; another count gives other weights")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)

    pairs = json.loads(args.questions.read_text(encoding="utf-8"))
    args.output.mkdir(parents=True, exist_ok=True)
    save_tokenizer(train_tokenizer(pairs), args.output)
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    examples = encode(pairs, tokenizer)
    respelled = [encode(variant, tokenizer) for variant in respell(pairs)]
    model = build_model(tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    answer_tokens = sum(len(example.answer) for example in examples)
    print(f"{len(pairs)} pairs, {answer_tokens} answer tokens, {len(tokenizer)} tokens, {parameters} parameters")

    train(model, examples, respelled, args.epochs, args.seed)
    save(model, args.questions, args.output)
    sys.exit(0 if verify(args.output, pairs) else "the saved model does not give back every answer")


if __name__ == "__main__":
    main()
