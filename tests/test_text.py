"""The text of a stream: what it says, where it stops, what it costs; and texts that are too long to be tokenized."""

from __future__ import annotations

import functools
import gc
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from nanovllm import LLM, EngineClosedError, RequestError, SamplingParams
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.engine.requests import RequestIntake
from nanovllm.engine.text.request_text import StreamedText, Vocabulary
from nanovllm.engine.text.stops import MAX_MARKS, StopFinder, has_marks, mark
from nanovllm.engine.text.token_bound import TokenBound
from tests import tiny
from tests.tokenizers_made import KINDS, SPECIAL

made = functools.cache(lambda kind: (tokenizer := KINDS[kind](), Vocabulary(tokenizer)))


def pieces_of(vocabulary, token_ids, stop=(), min_tokens=0, **options):
    """The pieces of a stream, the last one of `finish`, and how many tokens it took."""
    text, pieces = StreamedText(vocabulary, stop, **options), []
    for number, token_id in enumerate(token_ids, 1):
        pieces.append(text.add([token_id], may_stop=number >= min_tokens))
        if text.stopped:
            break
    return [*pieces, text.finish(token_ids)], text.stopped


# What a stream says


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_pieces_make_up_what_decoding_all_at_once_gives(kind, skip, data):
    tokenizer, vocabulary = made(kind)
    # Runs of few different tokens, so that what never makes a character, or no text, goes on for long.
    last = len(tokenizer) + 2
    some = st.lists(st.integers(0, last), min_size=1, max_size=40)
    few = st.lists(st.integers(0, last), min_size=1, max_size=3).flatmap(
        lambda ids: st.lists(st.sampled_from(ids), min_size=1, max_size=60)
    )
    token_ids = [token for run in data.draw(st.lists(some | few, min_size=1, max_size=4)) for token in run]
    pieces, _ = pieces_of(vocabulary, token_ids, skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
def test_long_streams_of_every_token_alone_and_beside_each_other_one(kind):
    tokenizer, vocabulary = made(kind)
    rng = random.Random(0)
    for token_id in range(len(tokenizer)):
        other = rng.randrange(len(tokenizer))
        for token_ids in ([token_id] * 60, [other] + [token_id] * 60, [token_id, other] * 40):
            token_ids = [*token_ids, rng.randrange(len(tokenizer))]
            pieces, _ = pieces_of(vocabulary, token_ids)
            assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens=True), token_ids


def test_text_is_shown_as_soon_as_no_later_token_can_change_it():
    tokenizer, vocabulary = made("byte_level")
    text = StreamedText(vocabulary)
    byte_tokens = tokenizer.encode("x日", add_special_tokens=False)
    assert len(byte_tokens) == 4
    assert [text.add([token], may_stop=True) for token in byte_tokens] == ["x", "", "", "日"]
    broken = tokenizer.convert_tokens_to_ids("ÿ")
    assert [text.add([token], may_stop=True) for token in [broken] * 3] == ["", "�", "�"]
    assert text.finish([]) == "�"


def test_a_byte_that_spoils_its_run_fails_no_request():
    tokenizer, vocabulary = made("byte_fallback")
    token_ids = tokenizer.convert_tokens_to_ids(["▁a", "<0xC3>", "<0xA9>", "<0xFF>", "b"])
    assert pieces_of(vocabulary, token_ids)[0] == ["a", "", "", "", "���b", ""]
    assert "".join(pieces_of(vocabulary, token_ids[:3])[0]) == "aé"


# Where it stops


def found_at(stops, pieces):
    """By the book: the number of characters before the first stop string found, or None."""
    text = ""
    for piece in pieces:
        text += piece
        starts = [text.index(stop) for stop in stops if stop in text]
        if starts:
            return sum(not has_marks(char) for char in text[: min(starts)])
    return None


@given(
    stops=st.lists(st.text(f"ab{mark(1)}", min_size=1, max_size=7), min_size=1, max_size=8),
    pieces=st.lists(st.text(f"abc{mark(0)}{mark(1)}", max_size=5), max_size=20),
)
def test_stop_strings_are_found_where_they_begin_first_and_only_their_beginnings_are_held(stops, pieces):
    finder, shown, text, written = StopFinder(stops), 0, "", ""
    expected = found_at(stops, pieces)
    for piece in pieces:
        text += "".join(char for char in piece if not has_marks(char))
        found = finder.add(piece)
        if found is not None:
            assert len(text) - found.since_begin == expected
            assert len(text) - found.since_begin >= shown
            ended = "".join(char for char in written + piece if not has_marks(char))[: len(text) - found.since_end]
            assert any(ended.endswith("".join(c for c in stop if not has_marks(c))) for stop in stops)
            return
        written += piece
        ends = [written[start:] for start in range(len(written) + 1)]
        held = next(end for end in ends if any(stop.startswith(end) for stop in stops))
        assert finder.num_held == sum(not has_marks(char) for char in held)
        shown = len(text) - finder.num_held
    assert expected is None


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_stop_strings_of_ordinary_text_stop_where_they_did(kind, data):
    tokenizer, vocabulary = made(kind)
    token_ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=30))
    whole = tokenizer.decode(token_ids, skip_special_tokens=True)
    starts = data.draw(st.lists(st.integers(0, max(0, len(whole) - 1)), min_size=1, max_size=3))
    stops = tuple(stop for start in starts if (stop := whole[start : start + data.draw(st.integers(1, 4))]))
    if any("�" in stop for stop in stops):
        return  # whether an open character is one depends on what comes
    pieces, stopped = pieces_of(vocabulary, token_ids, stops)
    assert not any(stop in "".join(pieces) for stop in stops)
    if not kind.startswith("byte_fallback"):  # there a stop string is found before its run of bytes has ended
        expected = found_at(stops, pieces_of(vocabulary, token_ids)[0])
        assert stopped == (expected is not None)
        assert "".join(pieces) == whole[:expected]
        if expected is not None:
            included = "".join(pieces_of(vocabulary, token_ids, stops, include_stop=True)[0])
            assert included in {whole[:expected] + stop for stop in stops}
            assert whole.startswith(included)


def ids(tokenizer, *tokens):
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "word_ends"])
@pytest.mark.parametrize(
    ("stop", "written", "text"),
    [
        (["<|im_end|>"], ["a", "<|im_end|>"], "a"),
        (["<|im_end|>"], ["a", "<|im_start|>", "<|im_end|>"], "a"),
        (["<|im_end|>"], ["<|im_end|>"], ""),
        (["b<|im_end|>"], ["a", "b", "<|im_end|>"], "a"),
        (["b<|im_end|>"], ["b", "a", "<|im_end|>"], None),
        (["b<|im_end|>"], ["b", "<|im_start|>", "<|im_end|>"], None),
        (["<|im_end|>b"], ["a", "<|im_end|>", "b"], "a"),
        (["<|im_end|><|im_start|>"], ["a", "<|im_end|>", "<|im_start|>"], "a"),
        (["<|im_end|><|im_start|>"], ["a", "<|im_end|>", "<|end|>", "<|im_start|>"], None),
        (["a<|im_end|>b<|im_start|>"], ["b", "a", "<|im_end|>", "b", "<|im_start|>"], "b"),
        (["a<|im_end|>", "<|im_start|>"], ["b", "a", "<|im_start|>"], "ba"),
        (["a<|im_end|>", "ba"], ["b", "<|im_end|>", "a", "a"], ""),
        (["im_end"], ["a", "<|im_end|>"], None),
        (["|>", "<|im_"], ["a", "<|im_end|>", "<|im_start|>"], None),
        (["<think>"], ["a", "<think>"], "a"),
        (["<|im_end|>", "\ud800"], ["a", "<|im_end|>"], "a"),
    ],
)
def test_stop_strings_that_name_special_tokens(kind, stop, written, text):
    tokenizer, vocabulary = made(kind)
    pieces, stopped = pieces_of(vocabulary, ids(tokenizer, *written), tuple(stop))
    whole = "".join(token for token in written if token not in SPECIAL)
    assert stopped == (text is not None)
    assert "".join(pieces) == (whole if text is None else text)


def test_the_text_of_a_special_token_written_by_others_stops_as_well():
    tokenizer, vocabulary = made("byte_level")
    pieces, stopped = pieces_of(vocabulary, ids(tokenizer, *"ab<|im_end|>"), ("b<|im_end|>",))
    assert stopped
    assert "".join(pieces) == "a"


def test_special_tokens_before_min_tokens_do_not_stop_and_a_stop_token_may_be_part_of_a_stop_string():
    tokenizer, vocabulary = made("byte_level")
    written = ids(tokenizer, "a", "<|im_end|>", "b", "<|im_end|>", "c")
    assert "".join(pieces_of(vocabulary, written, ("<|im_end|>",), min_tokens=3)[0]) == "ab"
    assert "".join(pieces_of(vocabulary, written, ("a<|im_end|>",), min_tokens=2)[0]) == "abc"
    for stop, expected in (("b<|im_end|>", "a"), ("c<|im_end|>", "ab"), ("<|im_end|>", "ab")):
        text = StreamedText(vocabulary, (stop,))
        shown = [text.add([token], may_stop=True) for token in ids(tokenizer, "a", "b")]
        shown += [text.add_stop_token(*ids(tokenizer, "<|im_end|>")), text.finish([])]
        assert "".join(shown) == expected


def test_nothing_comes_after_a_stop():
    tokenizer, vocabulary = made("byte_level")
    text = StreamedText(vocabulary, ("b",))
    assert [text.add([token], may_stop=True) for token in ids(tokenizer, *"abcc")] == ["a", "", "", ""]
    assert text.finish([]) == ""


def test_a_stop_within_an_open_run_of_bytes_is_found_at_once():
    tokenizer, vocabulary = made("byte_fallback")
    written = ids(tokenizer, "▁a", "<0xC3>", "<0xA9>", "<0x0A>", "<0x0A>", "b")
    text = StreamedText(vocabulary, ("\n",))
    assert "".join(text.add([token], may_stop=True) for token in written[:4]) == "aé"
    assert text.stopped
    early = pieces_of(vocabulary, [*written, *written], ("\n",), min_tokens=6)
    assert "".join(early[0]) == "aé\n\nb aé"
    text = StreamedText(vocabulary, ("é<|im_end|>",))
    assert "".join(text.add([token], may_stop=True) for token in [*written[:3], *ids(tokenizer, "<|im_end|>")]) == "a"
    assert text.stopped
    text = StreamedText(vocabulary, ("a<|im_end|>", "é"))
    assert text.add(ids(tokenizer, "▁a", "<0xC3>", "<|im_end|>", "<0xA9>"), may_stop=True) == ""
    assert text.stopped
    assert text.finish([]) == ""


def test_stop_strings_name_more_special_tokens_than_can_be_told_apart():
    tokenizer = KINDS["byte_level"]()
    names = [f"<|{number}|>" for number in range(MAX_MARKS)]
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    intake = RequestIntake(tokenizer, len(tokenizer), 100, 100, frozenset(), 0)
    assert intake.checked_params(SamplingParams(stop=names[1:]))
    with pytest.raises(RequestError, match="stop names 2048 different special tokens; at most 2047 are told apart"):
        intake.checked_params(SamplingParams(stop=names))


FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def talker():
    with LLM(DEMO_MODEL_PATH, device="cpu", num_kvcache_blocks=16) as llm:
        yield llm


def ask(llm, **params):
    return llm.chat(FRANCE, SamplingParams(temperature=0, max_tokens=60, **params), use_tqdm=False)[0]


@pytest.mark.parametrize("streamed", [True, False])
def test_the_text_has_special_tokens_and_the_stop_where_that_is_asked_for(talker, streamed):
    def text_of(**params):
        if not streamed:
            return ask(talker, **params)["text"]
        prompt = ask(talker)["prompt_token_ids"]
        params = SamplingParams(temperature=0, max_tokens=60, **params)
        return "".join(output.text for output in talker.generate_stream(prompt, params))

    plain = text_of()
    assert text_of(include_stop_str_in_output=True) == plain  # the token that ends it is special
    assert text_of(skip_special_tokens=False) == plain  # and is no part of the text
    assert text_of(skip_special_tokens=False, include_stop_str_in_output=True) == plain + "<|im_end|>"
    word = plain.split()[2]
    assert text_of(stop=word) == plain[: plain.index(word)]
    assert text_of(stop=word, include_stop_str_in_output=True) == plain[: plain.index(word) + len(word)]
    only = {"skip_special_tokens": False, "ignore_eos": True}
    assert text_of(stop="<|im_end|>", **only) == plain
    assert text_of(stop="<|im_end|>", include_stop_str_in_output=True, **only) == plain + "<|im_end|>"


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_the_engine_stops_at_a_special_token_that_is_a_stop_string(talker, ignore_eos):
    plain = ask(talker)
    answer = ask(talker, ignore_eos=ignore_eos, stop="<|im_end|>")
    assert answer["text"] == plain["text"]
    assert (answer["finish_reason"], answer["token_ids"]) == ("stop", plain["token_ids"])
    answer = ask(talker, ignore_eos=ignore_eos, stop=["no such", "cafés.<|im_end|>"])
    assert (answer["text"], answer["finish_reason"]) == (plain["text"].removesuffix("cafés."), "stop")


def test_a_special_token_as_stop_string_waits_for_min_tokens(talker):
    first_end = len(ask(talker)["token_ids"])
    answer = ask(talker, ignore_eos=True, stop="<|im_end|>", min_tokens=first_end + 1)
    assert len(answer["token_ids"]) == first_end + 1
    assert answer["finish_reason"] == "stop"


# What it costs

STREAMS = {
    "special tokens": ("byte_level", ["<|end|>", "<|im_start|>"], ()),
    "special tokens, stop strings with others": ("byte_level", ["<|end|>"], ("a<|im_end|>", "<|im_end|>" * 50)),
    "bytes without a beginning": ("byte_level", ["©"], ()),
    "bytes without an end": ("byte_level", ["Ã", "ã"], ()),
    "bytes that are none": ("byte_level", ["ÿ"], ("x" * 1000,)),
    "bytes in a sequence": ("byte_level_in_a_sequence", ["©"], ()),
    "fallback bytes": ("byte_fallback", ["<0xC3>", "<0xA9>"], ("y" * 1000,)),
    "fallback bytes and specials": ("byte_fallback", ["<0xC3>", "<|end|>"], ("é<|im_end|>",)),
    "no tokens": ("byte_level", [99999], ()),
    "pads": ("repeats_once", ["<pad>"], ()),
    "spaces": ("byte_fallback", ["▁"], ()),
    "text": ("byte_level", list("thecat"), ()),
    "text, a long stop string": ("byte_level", list("abab"), ("abab" * 250 + "c",)),
    "a partial match that grows": ("byte_level", ["a"], ("a" * 50_000 + "b",)),
    "a partial match that is full": ("byte_level", ["a"], ("a" * 1000 + "b",)),
    "many stop strings": ("byte_level", list("the cat".replace(" ", "")), tuple(f"the{i:02}" * 20 for i in range(64))),
    "many stop strings, each the beginning": ("byte_level", ["a"], tuple("a" * (100 + i) + "b" for i in range(64))),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_a_token_costs_as_much_after_8000_others_as_at_the_beginning(stream):
    kind, tokens, stop = STREAMS[stream]
    tokenizer, vocabulary = made(kind)
    token_ids = [token if isinstance(token, int) else tokenizer.convert_tokens_to_ids(token) for token in tokens]
    assert None not in token_ids
    first, last = [], []
    while len(first) < 5 or (min(last) > 3 * min(first) and len(first) < 50):
        text, times = StreamedText(vocabulary, stop), [time.thread_time()]
        for _ in range(9):
            for number in range(1000):
                text.add([token_ids[number % len(token_ids)]], may_stop=True)
            times.append(time.thread_time())
        assert not text.stopped
        first.append(times[1] - times[0])
        last.append(times[-1] - times[-2])
    assert min(last) <= 3 * min(first)


# Texts that are too long to be tokenized


def intake_of(tokenizer, max_model_len=4096):
    return RequestIntake(tokenizer, len(tokenizer), max_model_len, 10**9, frozenset(), 0)


@pytest.mark.parametrize("text", ["hello world ", " ", "é", "日本語", "e\u0301", "🙂", "<|im_end|>"])
def test_ten_megabytes_are_refused_at_once_without_tokenizing_them(monkeypatch, text):
    tokenizer = KINDS["byte_level"]()
    intake = intake_of(tokenizer)
    assert intake._token_bound.longest == len("<|im_start|>")
    monkeypatch.setattr(type(tokenizer), "encode", lambda *_, **__: pytest.fail("it was tokenized"))
    fewest, counted = TokenBound._fewest, []
    monkeypatch.setattr(TokenBound, "_fewest", lambda bound, chunk: (counted.append(chunk), fewest(bound, chunk))[1])
    text *= 10_000_000 // len(text.encode())
    with pytest.raises(RequestError, match=f"the prompt has {len(text)} characters.*4095.*max_model_len=4096"):
        intake.checked_prompt(text)
    assert 0 < sum(map(len, counted)) <= 2 << 16, "no more than its beginning is looked at"


@pytest.mark.parametrize("text", ["\ud800" + "a" * 10**6, "é\ud800" * 10**5])
def test_a_long_text_that_is_not_unicode_is_refused_as_such(text):
    with pytest.raises(RequestError, match="not valid Unicode"):
        intake_of(made("byte_level")[0]).checked_prompt(text)


def test_every_way_in_refuses_what_is_too_long(talker):
    text = "word " * 2_000_000
    for refused in (
        lambda: talker.add_request(text),
        lambda: talker.generate_stream(text),
        lambda: talker.generate([text], use_tqdm=False),
        lambda: talker.chat([{"role": "user", "content": text}], use_tqdm=False),
    ):
        with pytest.raises(RequestError, match=r"the prompt has 100000\d\d characters, which are more than"):
            refused()
    assert talker.is_finished()


def changed(**parts):
    tokenizer = KINDS["byte_level"]()
    for name, part in parts.items():
        setattr(tokenizer.backend_tokenizer, name, part)
    return tokenizer


def with_added(**options):
    tokenizer = KINDS["byte_level"]()
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<added>", **options)])
    return tokenizer


BOUNDED = {
    "byte_level": KINDS["byte_level"],
    "byte_fallback": KINDS["byte_fallback"],
    "plain": lambda: changed(normalizer=normalizers.Sequence([])),
    "decomposed": lambda: changed(normalizer=normalizers.NFKD()),
    "composed": lambda: changed(normalizer=normalizers.NFKC()),
    "lower": lambda: changed(normalizer=normalizers.Sequence([normalizers.Lowercase(), normalizers.NFC()])),
    "added": lambda: with_added(normalized=True),
}

UNBOUNDED = {
    "unknown words are one token": KINDS["word_piece"],
    "unknown characters are joined": KINDS["metaspace"],
    "accents are dropped": lambda: changed(normalizer=normalizers.StripAccents()),
    "spaces are joined": lambda: changed(normalizer=normalizers.Replace(Regex(" +"), " ")),
    "spaces are dropped": lambda: changed(pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
    "separators are dropped": lambda: changed(pre_tokenizer=pre_tokenizers.Split(" ", "removed")),
    "a token takes the spaces before it": lambda: with_added(lstrip=True),
    "a token takes the spaces after it": lambda: with_added(rstrip=True),
    "some bytes have no token": lambda: changed(model=models.BPE(vocab={"a": 0}, merges=[])),
}


@pytest.mark.parametrize("kind", UNBOUNDED)
def test_where_a_token_may_stand_for_any_number_of_characters_there_is_no_bound(kind):
    bound = TokenBound(UNBOUNDED[kind]())
    assert bound.longest is None
    assert not bound.exceeds(" " * 100_000, 1)


@pytest.mark.parametrize("kind", BOUNDED)
@given(data=st.data())
def test_the_bound_never_refuses_what_fits(kind, data):
    tokenizer, bound = bounded(kind)
    assert bound.longest is not None
    alphabet = "ae \u0301\u0327Å\u212b日ｶﾞ각ᄀ\u1161\u11a8ßİΣ\n🙂<"
    parts = st.sampled_from(["<|im_start|>", "<think>", "<added>", " " * 8, "the the ", "e\u0301" * 9])
    text = "".join(data.draw(st.lists(st.text(alphabet, max_size=8) | parts, max_size=30)))
    text *= data.draw(st.sampled_from([1, 1, 7]))
    num_tokens = len(tokenizer.encode(text, add_special_tokens=False)) if text else 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanovllm.engine.text.token_bound.CHUNK", data.draw(st.sampled_from([3, 10, 1 << 16])))
        assert not bound.exceeds(text, num_tokens)


@functools.cache
def bounded(kind):
    tokenizer = BOUNDED[kind]()
    return tokenizer, TokenBound(tokenizer)


def test_the_bound_is_met_by_a_text_of_the_longest_tokens_alone():
    _, bound = bounded("plain")
    text = "<|im_start|>" * 500
    assert not bound.exceeds(text, 500)
    assert bound.exceeds(text, 499)


# Streams that were closed


@pytest.fixture
def llm(tiny_path):
    with LLM(tiny_path, device="cpu") as llm:
        yield llm


LONG = SamplingParams(temperature=0, max_tokens=50)


@pytest.mark.parametrize("num_read", [0, 1, 3])
def test_a_closed_stream_yields_nothing_more(llm, num_read):
    stream = llm.generate_stream([1, 2, 3], LONG)
    for _ in range(num_read):
        next(stream)
    stream.close()
    assert list(stream) == []
    with pytest.raises(StopIteration):
        next(stream)
    assert llm.is_finished()


def test_a_stream_that_is_closed_with_outputs_ready_yields_none_of_them(llm):
    stream, other = (llm.generate_stream([token], LONG) for token in (1, 2))
    for _ in range(10):
        next(other)
    stream.close()
    assert list(stream) == []
    assert len(list(other)) == 40


def test_a_stream_that_has_ended_yields_nothing_more(llm, checkpoint):
    stream = llm.generate_stream([1, 2, 3], LONG)
    tokens = [token for output in stream for token in output.new_token_ids]
    assert tokens == tiny.reference_tokens(checkpoint("gqa2")[1], [1, 2, 3], 50)
    stream.close()
    for _ in range(2):
        assert list(stream) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_stream_whose_next_raised_yields_nothing_more(llm, monkeypatch, error):
    stream = llm.generate_stream([1, 2, 3], LONG)
    next(stream)

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(llm._loop, "launch_steps", fail)
        with pytest.raises(error):
            list(stream)
    assert list(stream) == []
    assert llm.is_finished()


def test_a_stream_of_a_closed_engine_says_so_once(tiny_path):
    with LLM(tiny_path, device="cpu") as llm:
        stream = llm.generate_stream([1, 2, 3], LONG)
        next(stream)
    with pytest.raises(EngineClosedError):
        list(stream)
    assert list(stream) == []


def test_a_stream_closed_within_a_step_of_another_yields_nothing_more(llm):
    stream, other = (llm.generate_stream([token], LONG) for token in (1, 2))
    next(stream)
    stream.close()
    for _ in range(5):
        next(other)
    gc.collect()
    assert list(stream) == []
    assert len(list(other)) == 45
