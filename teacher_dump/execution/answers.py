"""Answers of the teacher's own, for `data.responses: teacher`: asked for once, before the dump that scores them.

```
<run>/answers/<key>/part-00000.jsonl   the answered samples of a part of the questions' plan, written whole
<run>/answers/<key>/<split>.jsonl      the data set that the dump reads in place of data.sources
<run>/answers/<key>/answers.json       written last: the splits, the sampling
```

The key is a hash of questions, teacher, tokenisation and sampling. Whatever is there is not asked again, so a run that
was stopped resumes. Ray starts `python -m teacher_dump.execution.answers JOB STRIPE NUM`: it answers every NUM-th part.
An answer keeps its token ids, which its text need not spell; the text is for a person. An answer that does not end
within `max_new_tokens`, or is empty, makes its sample an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.backends.disk import report_full_disk
from storage.backends.folder import write_atomically
from storage.config import CacheSection
from storage.errors import ConfigError, StillhouseError
from storage.processes.search_path import module_command
from storage.processes.stop_signals import end_process, exit_code, explain, interruptible
from storage.records.records import SampleError
from teacher_dump.config import DataSection, DumpSection, SamplingSection, SourceSection, TeacherSection
from teacher_dump.data.conversation import GENERATED_IDS
from teacher_dump.data.plan import Part
from teacher_dump.data.samples import Sample, SampleRefusedError, Turn
from teacher_dump.data.unread_fields import IGNORABLE
from teacher_dump.execution.assignment import worker_settings
from teacher_dump.execution.log_file import quiet
from teacher_dump.execution.writing import LOG_FILE
from teacher_dump.planning.dump_plan import DumpPlan, plan_questions
from teacher_dump.prompts.prompt import IMAGE_MARKER
from teacher_dump.settings import DumpSettings

if TYPE_CHECKING:
    from teacher_dump.prompts.preparation import Preparer
    from teacher_dump.teachers.teacher import Generator, TeacherPrompt

_log = logging.getLogger(__name__)
_PARTS, _DONE, _JOB = "part-{:05d}.jsonl", "answers.json", "job.json"
_SAMPLES_PER_CALL = 32  # of the engine
_SEED_BITS = 0x7FFF_FFFF  # engines take seeds of 31 bits


def answered_settings(settings: DumpSettings, questions: DumpPlan) -> DumpSettings | None:
    """The settings of a dump over the teacher's answers, if all of them are there.

    `questions`: the plan of `settings`.
    """
    folder = _folder(settings, questions)
    try:
        done = json.loads((folder / _DONE).read_bytes())
    except FileNotFoundError:
        return None
    sources = tuple(
        SourceSection(
            path=str(folder / name),
            format="json",
            images=questions.identity.image_root,
            split=split,
            ignore=IGNORABLE,  # what the data's own sources do not ignore is refused by now
        )
        for split, name in done["splits"]
    )
    data = settings.data.model_copy(update={"sources": sources, "responses": "dataset"})
    return replace(settings, data=data, answered={"responses": "teacher", **done["sampling"]})


def ask(settings: DumpSettings, questions: DumpPlan, *, progress: bool = True) -> None:
    """Have the teacher answer whatever is not answered yet, in as many processes as the dump has actors.

    StillhouseError: a process failed; what it had answered stays.
    """
    from teacher_dump import ray_jobs

    folder = _folder(settings, questions)
    folder.mkdir(parents=True, exist_ok=True)
    missing = sum(not (folder / _PARTS.format(part.number)).exists() for part in questions.plan.parts)
    if missing:
        _write(folder / _JOB, json.dumps(_job(settings)))
        count = min(settings.dump.actors.max, missing)
        commands = [
            ray_jobs.Command(
                name=f"answers-{stripe}",
                argv=(*module_command("teacher_dump.execution.answers"), str(folder / _JOB), str(stripe), str(count)),
                log_path=settings.logs.resolve() / f"answers-{stripe}.log",
                num_devices=ray_jobs.gpus_of_engine(settings.teacher.settings),
            )
            for stripe in range(count)
        ]
        with quiet(settings.logs / LOG_FILE) as screen:
            if progress:
                print(f"answers: the teacher answers {missing:,} parts; logs are in {settings.logs}", file=screen)
            results = ray_jobs.run_commands(
                commands,
                settings.dump.cpus_per_actor,
                settings.dump.gpus_per_actor,
                address=settings.dump.ray_address,
                logs=settings.logs,
            )
            with closing(results):
                failed = [result for result in results if result.returncode]
        if failed:
            kind = ConfigError if failed[0].returncode == 2 else StillhouseError
            raise kind(f"the teacher's answers: {_last_line(failed[0].log_path)} (see {failed[0].log_path})")
    _assemble(folder, settings, questions)


def answer_parts(settings: DumpSettings, *, stripe: int, num_stripes: int) -> None:
    """Answer every `num_stripes`-th part that has no answers yet."""
    from teacher_dump.execution.worker import open_generator, open_preparer
    from teacher_dump.prompts.processor import load_processor

    questions = plan_questions(settings)
    folder = _folder(settings, questions)
    folder.mkdir(parents=True, exist_ok=True)
    todo = [part for part in questions.plan.parts[stripe::num_stripes] if not _part_file(folder, part).exists()]
    if not todo:
        return
    worker = worker_settings(questions, settings)
    trust = bool(worker.engine_settings.get("trust_remote_code", False))
    processor = load_processor(worker.checkpoint, trust_remote_code=trust)
    answerer = Answerer(
        preparer=open_preparer(worker),
        generator=open_generator(worker),
        tokenizer=getattr(processor, "tokenizer", processor),
        image_token_id=worker.facts.image_token_id,
        eos_token_ids=worker.facts.eos_token_ids,
        sampling=settings.data.sampling,
        vocab_size=worker.facts.vocab_size,
    )
    for part in todo:
        rows = [json.dumps(row) for row in answerer.rows(part)]
        _write(_part_file(folder, part), "".join(f"{row}\n" for row in rows))


@dataclass(frozen=True)
class Answerer:
    """Asks a generating teacher the questions of samples, each with its own earlier answers before it."""

    preparer: Preparer
    generator: Generator
    tokenizer: Any
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    sampling: SamplingSection
    vocab_size: int  # the tokenizer's real one; a padded head can say ids beyond it

    def rows(self, part: Part) -> Iterator[dict[str, Any]]:
        """A part's samples as rows of a data set; one that has no answers says why."""
        for error in part.errors:
            yield {"split": None, "id": error.sample_id, "refused": error.reason}
        for start in range(0, len(part.samples), _SAMPLES_PER_CALL):
            samples = part.samples[start : start + _SAMPLES_PER_CALL]
            errors: list[SampleError] = []
            answered = {sample.id: sample for sample in self.answered(samples, errors)}
            reasons = {error.sample_id: error.reason for error in errors}
            for sample in samples:
                row = {"split": sample.split, "id": sample.id, "category": sample.category}
                if sample.id in answered:
                    messages = [_message(turn) for turn in answered[sample.id].turns]
                    yield {**row, "images": list(sample.images), "messages": messages}
                else:
                    yield {**row, "refused": reasons[sample.id]}

    def answered(self, samples: Sequence[Sample], errors: list[SampleError]) -> list[Sample]:
        """The samples with every answer replaced by the teacher's; the others are added to `errors`."""
        active = list(samples)
        for number in range(max((len(sample.turns) for sample in samples), default=0)):
            asked: list[tuple[int, TeacherPrompt]] = []
            for place, sample in enumerate(active):
                if number < len(sample.turns) and sample.turns[number].role == "assistant":
                    try:
                        asked.append((place, self._prompt(sample, number)))
                    except SampleRefusedError as refusal:
                        errors.append(SampleError(sample.id, str(refusal)))
            seeds = [_seed(self.sampling.seed, active[place].id, number) for place, _ in asked]
            answers = self._generate([prompt for _, prompt in asked], seeds)
            for (place, _), answer in zip(asked, answers, strict=True):
                try:
                    if isinstance(answer, SampleRefusedError):
                        raise answer
                    turns = active[place].turns
                    turn = replace(turns[number], text=self._text(answer, number), token_ids=tuple(answer))
                    active[place] = replace(active[place], turns=(*turns[:number], turn, *turns[number + 1 :]))
                except SampleRefusedError as refusal:
                    errors.append(SampleError(active[place].id, str(refusal)))
            failed = {error.sample_id for error in errors}
            active = [sample for sample in active if sample.id not in failed]
        return active

    def _generate(self, prompts: Sequence[TeacherPrompt], seeds: Sequence[int]) -> list[list[int] | SampleRefusedError]:
        """The tokens of each answer, or why there is none. When a call fails, its prompts are tried one by one."""
        from teacher_dump.execution.device_failure import PromptRefusedError, is_device_failure

        def generate(start: int, stop: int) -> list[list[int]]:
            return self.generator.generate(
                prompts[start:stop], sampling=self.sampling, seeds=seeds[start:stop], stop_ids=self.eos_token_ids
            )

        try:
            return [*generate(0, len(prompts))]
        except Exception as error:  # an engine raises its own kinds
            if isinstance(error, StillhouseError) or is_device_failure(error):
                raise
            _log.warning("the teacher failed on %d prompts together: %s", len(prompts), error)
        answers: list[list[int] | SampleRefusedError] = []
        failure: Exception | None = None
        for at in range(len(prompts)):
            try:
                answers += generate(at, at + 1)
            except PromptRefusedError as error:
                answers.append(SampleRefusedError(f"the teacher refuses this sample: {error}"))
            except Exception as error:
                if isinstance(error, StillhouseError) or is_device_failure(error):
                    raise
                failure = error
                answers.append(SampleRefusedError(f"the teacher failed: {error}"))
        if failure is not None and len(answers) > 1 and all(isinstance(one, SampleRefusedError) for one in answers):
            raise StillhouseError(f"the teacher fails on every prompt; {failure}") from failure
        return answers

    def _prompt(self, sample: Sample, number: int) -> TeacherPrompt:
        """What the teacher sees before its answer at turn `number`: the ids up to where an answer would start."""
        from teacher_dump.teachers.teacher import TeacherPrompt

        turns = (*sample.turns[:number], Turn("assistant", "", token_ids=self.eos_token_ids[:1]))
        has_markers = any(IMAGE_MARKER in turn.text for turn in sample.turns)
        shown = sum(turn.text.count(IMAGE_MARKER) for turn in turns) if has_markers else len(sample.images)
        prepared = self.preparer.prepare(replace(sample, turns=turns, images=sample.images[:shown]))
        return TeacherPrompt(prepared.record.token_ids[:-1], prepared.prompt.images)  # without that stop token

    def _text(self, token_ids: Sequence[int], number: int) -> str:
        if not token_ids or token_ids[-1] not in self.eos_token_ids:
            raise SampleRefusedError(
                f"the teacher's answer at turn {number} does not end within {len(token_ids)} tokens; "
                "data.sampling.max_new_tokens and teacher.max_length limit them"
            )
        if max(token_ids) >= self.vocab_size:
            raise SampleRefusedError(
                f"the teacher's answer at turn {number} holds token {max(token_ids)}, which the tokenizer does not have"
            )
        if self.image_token_id in token_ids:
            raise SampleRefusedError(f"the teacher's answer at turn {number} holds its own image token")
        text = self.tokenizer.decode(list(token_ids[:-1]), skip_special_tokens=False)
        if not text.strip():
            raise SampleRefusedError(f"the teacher's answer at turn {number} is empty")
        return text


def _message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.text}
    if not turn.is_trained:
        message["loss"] = False
    return message if turn.token_ids is None else {**message, GENERATED_IDS: list(turn.token_ids)}


def _assemble(folder: Path, settings: DumpSettings, questions: DumpPlan) -> None:
    """One file a split, in the order of the plan, and the document that says that all is there."""
    by_split: dict[str, list[str]] = {}
    for part in questions.plan.parts:
        for line in _part_file(folder, part).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            split = row.pop("split") or next(iter(by_split), "train")
            by_split.setdefault(split, []).append(json.dumps(row))
    splits = [(split, f"split-{number}.jsonl") for number, split in enumerate(by_split)]
    for split, name in splits:
        _write(folder / name, "".join(f"{line}\n" for line in by_split[split]))
    done = {
        "splits": splits,
        "sampling": settings.data.sampling.model_dump(mode="json"),
    }
    _write(folder / _DONE, json.dumps(done, indent=1))


def _folder(settings: DumpSettings, questions: DumpPlan) -> Path:
    identity = questions.identity.model_dump(mode="json", exclude={"selection", "image_root", "teacher"})
    sampling = settings.data.sampling.model_dump(mode="json")
    key = json.dumps([identity, questions.identity.selection["tokens"], sampling], sort_keys=True)
    return (settings.run / "answers" / hashlib.sha256(key.encode()).hexdigest()[:16]).resolve()


def _part_file(folder: Path, part: Part) -> Path:
    return folder / _PARTS.format(part.number)


def _write(path: Path, text: str) -> None:
    write_atomically(path, text.encode())


def _seed(seed: int, sample_id: str, turn: int) -> int:
    digest = hashlib.sha256(f"{seed}\0{sample_id}\0{turn}".encode()).digest()
    return int.from_bytes(digest[:4], "big") & _SEED_BITS


def _job(settings: DumpSettings) -> dict[str, Any]:
    sections = {name: getattr(settings, name).model_dump(mode="json") for name in ("data", "teacher", "dump", "cache")}
    return {"run": str(settings.run), **sections}


def _settings(job: dict[str, Any]) -> DumpSettings:
    return DumpSettings(
        Path(job["run"]),
        DataSection.model_validate(job["data"]),
        TeacherSection.model_validate(job["teacher"]),
        DumpSection.model_validate(job["dump"]),
        CacheSection.model_validate(job["cache"]),
    )


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return next((line for line in reversed(lines) if line.strip()), "no word in the log")


def main(arguments: Sequence[str]) -> int:
    """Answer one stripe of a job's parts; returns the exit code."""
    job, stripe, num_stripes = arguments
    try:
        with interruptible():
            settings = _settings(json.loads(Path(job).read_bytes()))
            answer_parts(settings, stripe=int(stripe), num_stripes=int(num_stripes))
    except KeyboardInterrupt as stop:  # between two parts or within one: a part is written whole
        sys.stderr.write(f"{explain(stop)}\n")
        return exit_code(stop)
    except StillhouseError as error:
        sys.stderr.write(f"{error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    except Exception as error:
        return report_full_disk(error, prefix="")
    return 0


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
