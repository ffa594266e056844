"""The reward registry, the built-in rewards, and how a function of one's own is called: by the names it has."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarl.errors import UserError
from megarl.reward import RewardInput, answer_fault, get_reward, maths
from megarl.reward.answers import after_thoughts
from megarl.reward.inputs import Texts, Wanted
from tools.tiny_model import make_tokenizer

CASES = Path(__file__).resolve().parents[1] / "cases"
TAGS = ("<think>", "</think>")


def sample(response: str, answer: str, prompt: str = "prompt", **more: Any) -> RewardInput:
    return RewardInput(response, answer, prompt, after_thoughts(response, prompt, TAGS), **more)


@pytest.mark.parametrize(
    ("name", "response", "answer", "value"),
    [
        ("digit_sum", "31568", "8", 1.0),
        ("digit_sum", "31568\n", "8", 1.0),
        ("digit_sum", "5156", "5", 0.0),
        ("digit_sum", "", "5", 0.0),
        ("exact_match", " 42\n", "42", 1.0),
        ("exact_match", "042", "42", 0.0),
        ("exact_match", "<think>41</think>\n42", "42", 1.0),
        ("math_verify", "so it is $\\frac{2}{4}$", "1/2", 1.0),
        ("math_verify", "first 3, thus \\boxed{0.5}", "\\frac{1}{2}", 1.0),
        ("math_verify", "the answer is 41", "42", 0.0),
        ("math_verify", "\\boxed{(x+1)^2}", "$x^2+2x+1$", 1.0),
        ("math_verify", "no idea", "42", 0.0),
        ("math_verify", "", "42", 0.0),
    ],
)
def test_built_in(name: str, response: str, answer: str, value: float) -> None:
    assert get_reward(name)(sample(response, answer)) == value


MATHS = [json.loads(line) for line in (CASES / "math_answers.jsonl").open(encoding="utf-8")]
MORE_MATHS = [
    ("\\boxed{\\$36}", "US\\$36", 1.0),
    ("\\boxed{-\\$5}", "-5", 1.0),
    ("\\boxed{3} and later \\boxed{4}", "3", 0.0),
    ("\\boxed{3} and later \\boxed{4", "3", 0.0),
    ("<think>\\boxed{4}", "4", 0.0),
    ("\\boxed{1 1/2}", "11/2", 0.0),
    ("\\boxed{2½}", "5/2", 1.0),
    ("\\boxed{E}", "(E)", 1.0),
    ("The answer is (B).", "B", 1.0),
    ("The answer is A, not B", "B", 0.0),
    ("#### 1,234", "1234", 1.0),
    ("\\boxed{2,3}", "$2$ and $3$", 1.0),
]


@pytest.mark.parametrize("case", MATHS, ids=[case["what"] for case in MATHS])
def test_fault_07_math_answers(case: dict[str, Any]) -> None:
    given, wanted = sample(case["response"], case["answer"]), case["reward"]
    if wanted is None:  # a bad row
        assert answer_fault("math_verify", case["answer"])
    else:
        assert get_reward("math_verify")(given) == wanted
        assert not case["answer"] or answer_fault("math_verify", case["answer"]) == ""


@pytest.mark.parametrize(("response", "answer", "value"), MORE_MATHS, ids=range(len(MORE_MATHS)))
def test_fault_07_more_math_answers(response: str, answer: str, value: float) -> None:
    assert get_reward("math_verify")(sample(response, answer)) == value
    assert answer_fault("math_verify", answer) == ""


@pytest.mark.parametrize("answer", ["", " ", "}", "$$", "\\$", "{", "\\frac{1}{2", "\\text{}}", "-"])
def test_fault_07_an_answer_that_nothing_can_equal_has_a_fault(answer: str) -> None:
    assert "(data.reward math_verify)" in answer_fault("math_verify", answer)


@pytest.mark.parametrize("reward", ["exact_match", "digit_sum"])
def test_a_blank_answer_has_a_fault_since_thoughts_that_never_end_equal_it(reward: str) -> None:
    assert get_reward(reward)(sample("<think>41" if reward == "exact_match" else "", " ")) == 1.0
    for answer in ("", " ", "\n"):
        assert answer_fault(reward, answer) == f"is blank; give the answer (data.reward {reward})"
    for answer in ("0", "}", "$$", "-"):
        assert answer_fault(reward, answer) == ""


def test_thoughts_that_the_prompt_began() -> None:
    assert after_thoughts("4</think>5", "2+3\n<think>\n", TAGS) == "5"
    assert after_thoughts("4", "2+3\n<think>\n", TAGS) == ""
    assert after_thoughts("4", "2+3", TAGS) == "4"
    assert after_thoughts("a</think>b</think>c<think>d", "", TAGS) == "c"
    assert after_thoughts("<think>4</think>5", "", ()) == "<think>4</think>5"


@pytest.mark.parametrize("name", ["math_verify.parse", "megarl.reward.maths.clean"])
def test_math_verify_has_a_limit_of_processor_time(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    reward = get_reward("math_verify")
    assert reward(sample("\\boxed{x^2-1}", "(x-1)(x+1)")) == 1.0
    monkeypatch.setattr(maths, "CPU_LIMIT_S", 0.2)

    def endless(*args: object, **keys: object) -> None:
        while True:
            with contextlib.suppress(Exception):
                sum(range(1000))

    monkeypatch.setattr(name, endless)
    assert reward(sample("\\boxed{x^2-1}", "(x+1)(x-1)")) == 0.0
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_the_expressions_of_maths_read_a_long_text_once() -> None:
    """Twice as long takes twice as long, and not four times: that would be hours of processor time here."""
    long = 400_000
    with maths._cpu_limit(30.0):
        assert maths._LAST_LETTER.findall("Answer:" + "字" * long) == []
        assert maths._LAST_LETTER.findall("Answer:" + "字" * long + " is " + "-" * long + " B") == ["B"]
        for text in ("0." + "3" * long, "1" + " " * long + "x", "1" * long + "½"):
            assert maths.clean(text) == text
        assert maths.clean("2" + " " * long + "½") == "\\frac{5}{2}"


def test_math_verify_works_in_a_thread() -> None:
    got: list[float] = []
    thread = threading.Thread(target=lambda: got.append(get_reward("math_verify")(sample("\\boxed{2/4}", "0.5"))))
    thread.start()
    thread.join(30)
    assert got == [1.0]


def test_fault_09_tags_that_are_special_tokens_reach_the_reward() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<think>", "</think>"]})
    tokens = tokenizer.encode("2+3=") + tokenizer.encode("<think>4</think>5<eos>")
    assert tokenizer.decode(tokens[4:], skip_special_tokens=True) == "45", "this test would pass anyway"
    given = Texts(tokenizer, TAGS).input(tokens, 4, "2+3=", "5", {"a": 1}, False)
    assert (given.response, given.final_response) == ("<think>4</think>5", "5")
    assert given.response_with_special_tokens == "<think>4</think>5<eos>"
    assert given.get("tokens") == tokens[4:] and given.get("prompt_tokens") == tokens[:4]
    assert Texts(tokenizer, []).input(tokens, 4, "2+3=", "5", {}, False).response == "45"


def test_special_tokens_are_decoded_for_rewards_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, decoded = make_tokenizer(), list[list[int]]()
    tokens = tokenizer.encode("2+3=") + tokenizer.encode("5<eos>")
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **how: decoded.append(ids) or decode(ids, **how))
    given = Texts(tokenizer, TAGS, tokens[-1:]).input(tokens, 4, "2+3=", "5", {}, False)
    assert Wanted(("response", "answer")).of(given, "mine") == {"response": "5", "answer": "5"}
    assert decoded == [tokens[4:-1]]
    assert Wanted(("response_with_special_tokens",)).of(given, "mine") == {"response_with_special_tokens": "5<eos>"}


def test_an_unknown_token_is_no_text_where_the_tokenizer_has_no_tags() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.unk_token_id == tokenizer.convert_tokens_to_ids("<think>")
    tokens = [*tokenizer.encode("2+3="), *tokenizer.encode("5"), tokenizer.unk_token_id]
    assert Texts(tokenizer, TAGS).input(tokens, 4, "2+3=", "5", {}, False).response == "5"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module of rewards into the working directory; its name."""

    def module(text: str) -> str:
        name = f"my_rewards_{abs(hash(text))}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return module


def test_dotted_path_in_the_working_directory(write: Callable[[str], str]) -> None:
    module = write("def length(response):\n    return len(response)\n\nconstant = 3\n")
    assert get_reward(f"{module}.length")(sample("abc", "")) == 3.0
    with pytest.raises(UserError, match="has no function 'constant'"):
        get_reward(f"{module}.constant")
    with pytest.raises(UserError, match="has no function 'width'"):
        get_reward(f"{module}.width")


SIGNATURES = [
    ("answer, prompt, response", "(response, answer, prompt)", ("12", "3", "1+2=")),
    ("response_text, answer, prompt_text", "(response_text, answer, prompt_text)", ("12", "3", "1+2=")),
    ("final_response, *, truncated", "(final_response, truncated)", ("12", True)),
    (
        "data_source, solution_str, ground_truth, extra_info=None",
        "(data_source, solution_str, ground_truth, extra_info)",
        ("sums", "12", "3", {}),
    ),
    ("row, data_source, level=None", "(row['data_source'], data_source, level)", ("sums", "sums", None)),
    ("tokens, prompt_tokens", "(tokens, prompt_tokens)", ([4, 5], [4, 6])),
    (
        "response, **others",
        "(response, others['answer'], others['ground_truth'], others['data_source'])",
        ("12", "3", "3", "sums"),
    ),
]


@pytest.mark.parametrize(("parameters", "seen", "wanted"), SIGNATURES, ids=[case[0] for case in SIGNATURES])
def test_fault_08_a_reward_is_called_by_its_parameters_names(
    write: Callable[[str], str], parameters: str, seen: str, wanted: tuple[Any, ...]
) -> None:
    module = write(f"calls = []\ndef reward({parameters}):\n    calls.append({seen})\n    return 1\n")
    reward = get_reward(f"{module}.reward")
    given = sample("12", "3", "1+2=", row={"data_source": "sums"}, tokens=(4, 5), prompt_tokens=(4, 6), truncated=True)
    assert reward(given) == 1.0
    assert reward.function.__globals__["calls"] == [wanted]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ("def reward(solution_text, answer)", "the parameter 'solution_text', which is neither one of response, "),
        ("def reward(completions, solution)", "nor a key of the row (prompt, answer)"),
        ("def reward(*texts)", "has the parameters (*texts); rewards are called by name"),
        ("def reward(response, answer, /)", "has the parameters (response, answer, /); rewards are called by name"),
        ("def reward()", "has the parameters (); rewards are called by name"),
        ("async def reward(response)", "is an async function; give a plain one"),
    ],
)
def test_fault_08_another_signature_is_refused_by_name(
    write: Callable[[str], str], definition: str, message: str
) -> None:
    module = write(f"{definition}:\n    return 1\n")
    with pytest.raises(UserError) as caught:
        get_reward(f"{module}.reward")(sample("12", "3", row={"prompt": "1", "answer": "3"}))
    text = str(caught.value)
    assert text.startswith(f"data.reward '{module}.reward' ") and message in text and "\n" not in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digitsum", "'digitsum' is unknown; did you mean 'digit_sum'"),
        ("zzz", "choose one of digit_sum, exact_match, math_verify or a dotted path"),
        ("no_such_package.reward", "importing 'no_such_package' failed (ModuleNotFoundError"),
        ("", "'' is unknown"),
        (".x", "'.x' is unknown"),
        ("operator.index", "has the parameters (a, /)"),
    ],
)
def test_unknown_names_are_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        get_reward(name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("float('nan')", "gave nan for response '13', answer '3', prompt '12='; a reward is a finite number"),
        ("float('inf')", "gave inf for response '13'"),
        ("None", "gave None for response '13'"),
        ("'high'", "gave 'high' for response '13'"),
        ("{'acc': 1}", "gave a dict with the keys 'acc'; it needs 'score'"),
        ("{'score': None}", "gave a dict with the keys 'score'; it needs 'score'"),
    ],
)
def test_a_reward_that_is_no_finite_number_names_the_sample(
    write: Callable[[str], str], value: str, message: str
) -> None:
    module = write(f"def bad(response, answer, prompt):\n    return {value}\n")
    with pytest.raises(UserError) as caught:
        get_reward(f"{module}.bad")(sample("13", "3", "12="))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("value", "number"), [("{'score': 0.5, 'acc': 1}", 0.5), ("{'reward': 2}", 2.0), ("True", 1.0)]
)
def test_fault_08_a_dict_with_a_score_counts(write: Callable[[str], str], value: str, number: float) -> None:
    module = write(f"def reward(response):\n    return {value}\n")
    assert get_reward(f"{module}.reward")(sample("13", "3")) == number
