"""docs/architectures.md: which architectures may teach and learn, made from the tests' own list and the table in code.

python -m docs.make_architectures           # writes the page
python -m docs.make_architectures --check   # exits with 1 if the page is not what tests and table say
"""

from __future__ import annotations

import sys
from pathlib import Path

from teacher_dump.teachers.architectures import EngineSupport, engine_support, has_prefix_attention, list_known_support
from tests.tiny_architectures import ARCHITECTURES, PUBLISHED, REFUSED_STUDENTS, TEXT_ONLY

PAGE = Path(__file__).with_name("architectures.md")
_TEACHERS = "tests/teacher_dump/teachers"
SHOWN_BY = {  # column: file and function of the test that shows it; [NAME] of the architecture follows
    "vLLM": f"{_TEACHERS}/test_architectures.py::test_both_teachers_give_the_same_signals",
    "transformers": f"{_TEACHERS}/test_architecture_faults.py::test_states_are_those_after_the_last_norm",
    "images": f"{_TEACHERS}/test_architectures.py::test_expansion_and_signals_are_those_of_the_whole_model",
    "student": "tests/student_train/models/test_architectures.py::"
    "test_logits_of_padded_batches_are_those_of_the_whole_model",
    "LLaVA student": "tests/student_train/models/test_student.py::"
    "test_hidden_states_and_head_are_those_of_the_whole_model",
    "refused student": "tests/student_train/models/test_architectures.py::"
    "test_a_student_that_the_losses_do_not_fit_is_refused",
    "prefix": f"{_TEACHERS}/test_paligemma.py",
}
NUMBERS = {name: number for number, name in enumerate(SHOWN_BY, start=1)}
ABSENT = {  # a family of checkpoints: what lacks it. Source: the model folders and registries of both libraries
    "LLaVA-OneVision-1.5": "transformers 5.19; vLLM 0.32 has no class for it either",
    "InternVL in its original form (`InternVLChatModel`)": "transformers; take the `-hf` checkpoint of the same model",
    "MiniCPM-V up to 4.5, MiniCPM-o": "transformers; they need remote code",
    "Phi-4-multimodal": "vLLM, in transformers' form; in its own form it needs remote code",
    "TinyLLaVA, MobileVLM, MoE-LLaVA in their original forms": "both libraries; [`convert`](checkpoints.md) them",
}


def make_page() -> str:
    """Returns the whole page."""
    rows = [_make_row(name) for name in ARCHITECTURES]
    prefixed = [support.model_type for support in list_known_support() if has_prefix_attention(support.model_type)]
    rows += [_make_prefix_row(name) for name in prefixed]
    return _HEAD.format(
        rows="\n".join(rows),
        tests="\n".join(f"{number}. `{SHOWN_BY[name]}`" for name, number in NUMBERS.items()),
        reasons="\n".join(_describe(support) for support in list_known_support() if support.state != "tested"),
        absent="\n".join(f"| {family} | {lacks} |" for family, lacks in ABSENT.items()),
    )


def _make_row(name: str) -> str:
    support, sees = engine_support(name), name not in TEXT_ONLY
    vllm = f"tested ({NUMBERS['vLLM']})" if support.state == "tested" else f"**{support.state}**"
    student = f"tested ({NUMBERS['LLaVA student' if name == 'llava' else 'student']})"
    if name in REFUSED_STUDENTS:
        student = f"**refused** ({NUMBERS['refused student']})"
    of_images = f"tested ({NUMBERS['images']})" if sees else "–"
    cells = [f"`{name}`", PUBLISHED[name], vllm, f"tested ({NUMBERS['transformers']})", student, of_images, of_images]
    return f"| {' | '.join(cells)} |"


def _make_prefix_row(name: str) -> str:
    shown = f"({NUMBERS['prefix']})"
    cells = [f"`{name}`", "PaliGemma 2", f"**{engine_support(name).state}**", f"tested {shown}"]
    return f"| {' | '.join([*cells, *[f'**refused** {shown}'] * 3])} |"


def _describe(support: EngineSupport) -> str:
    advice = f"; set `{support.way_round}`" if support.way_round else ""
    return f"| `{support.model_type}` | {support.state} | {support.reason}{advice} |"


_HEAD = """# Architectures

<!-- Made by `python -m docs.make_architectures` from the tests' list and the table in code. Change those. -->

Which models may teach and learn, by `model_type` of their `config.json`. Every architecture here has a tiny random
checkpoint in the tests, with a processor built from parts; a number in brackets is the test that shows it.

| model_type | published as | teacher by vLLM | teacher by transformers | student | visual rows | relation |
|---|---|---|---|---|---|---|
{rows}

- **tested**: vLLM and transformers give the same signals here, for several images, none, several turns and odd sizes.
- **untested**: no test compares the two for it. `stillhouse check` warns, and a dump needs a passed
  [engine check](commands.md) on your machine. Any `model_type` that is not listed is untested as well.
- **refused**: the command stops and names the reason and the way round.

The tests:

{tests}

In each, another picture changes an answer by 0.1 nats or more, and a shift by one row, a wrong norm and dropped
DeepStack features are seen.

## Untested and refused in vLLM

| model_type | state | why |
|---|---|---|
{reasons}

## Students

A student's logits must be its head times its last hidden states. `gemma4` soft-caps them, and in `paligemma` tokens
before the answer see each other, so neither can be trained here. `stillhouse check` lists the parameters that each
stage trains, by module; a projector includes the mergers of the Qwen families, DeepStack's among them.

## Absent

Checkpoints that transformers below 5.20 or vLLM 0.32 do not load without remote code:

| checkpoints | lacking in |
|---|---|
{absent}
"""


def main(arguments: list[str]) -> int:
    """Writes or checks the page; returns the exit code."""
    page = make_page()
    if arguments == ["--check"]:
        if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page:
            return 0
        sys.stderr.write(f"{PAGE}: is not what the tests' list says; run `python -m docs.make_architectures`\n")
        return 1
    if arguments:
        sys.stderr.write(f"unexpected argument {arguments[0]!r}; usage: python -m docs.make_architectures [--check]\n")
        return 2
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
