"""The reward registry and the three built-in rewards."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from megarl.errors import UserError
from megarl.reward import get_reward


@pytest.mark.parametrize(
    ("name", "response", "answer", "value"),
    [
        ("digit_sum", "31568", "8", 1.0),
        ("digit_sum", "31568\n", "8", 1.0),
        ("digit_sum", "5156", "5", 0.0),
        ("digit_sum", "", "5", 0.0),
        ("exact_match", " 42\n", "42", 1.0),
        ("exact_match", "042", "42", 0.0),
        ("math_verify", "so it is $\\frac{2}{4}$", "1/2", 1.0),
        ("math_verify", "first 3, thus \\boxed{0.5}", "\\frac{1}{2}", 1.0),
        ("math_verify", "the answer is 41", "42", 0.0),
        ("math_verify", "\\boxed{(x+1)^2}", "$x^2+2x+1$", 1.0),
        ("math_verify", "no idea", "42", 0.0),
        ("math_verify", "", "42", 0.0),
    ],
)
def test_built_in(name: str, response: str, answer: str, value: float) -> None:
    assert get_reward(name)(response, answer, "prompt") == value


def test_math_verify_works_in_a_thread() -> None:
    got: list[float] = []
    thread = threading.Thread(target=lambda: got.append(get_reward("math_verify")("\\boxed{2/4}", "0.5", "")))
    thread.start()
    thread.join(30)
    assert got == [1.0]


def test_dotted_path_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards_a.py").write_text(
        "def length(response, answer, prompt):\n    return len(response)\n\nconstant = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert get_reward("my_rewards_a.length")("abc", "", "") == 3.0
    with pytest.raises(UserError, match="has no function 'constant'"):
        get_reward("my_rewards_a.constant")
    with pytest.raises(UserError, match="has no function 'width'"):
        get_reward("my_rewards_a.width")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digitsum", "'digitsum' is unknown; did you mean 'digit_sum'"),
        ("zzz", "choose one of digit_sum, exact_match, math_verify or a dotted path"),
        ("no_such_package.reward", "importing 'no_such_package' failed (ModuleNotFoundError"),
        ("", "'' is unknown"),
        (".x", "'.x' is unknown"),
    ],
)
def test_unknown_names_are_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        get_reward(name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "None", "'high'"])
def test_a_reward_that_is_no_finite_number_names_the_sample(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"my_rewards_{abs(hash(value))}"
    (tmp_path / f"{module}.py").write_text(f"def bad(response, answer, prompt):\n    return {value}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="for prompt '12=', response '13', answer '3'"):
        get_reward(f"{module}.bad")("13", "3", "12=")
