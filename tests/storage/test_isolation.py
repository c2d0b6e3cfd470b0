import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FORBIDDEN = ("torch", "ray", "vllm", "deepspeed", "transformers", "stillhouse", "teacher_dump", "student_train")


def test_storage_imports_nothing_of_teacher_or_student():
    assert find_imported_packages("**/*.py", FORBIDDEN) == "[]"


def test_storage_needs_pillow_for_pixels_alone():
    assert find_imported_packages("*.py", ("PIL",)) == "[]"
    assert find_imported_packages("images/settings.py", ("PIL",)) == "[]"
    assert find_imported_packages("images/pixels.py", ("PIL",)) == "['PIL']"


def find_imported_packages(pattern: str, names: tuple[str, ...]) -> str:
    """Which of some packages are imported by the modules of storage that a pattern names."""
    files = [path.relative_to(REPOSITORY) for path in (REPOSITORY / "storage").glob(pattern)]
    modules = [".".join(path.with_suffix("").parts) for path in files if path.stem != "__init__"]
    assert modules
    code = f"import sys, {', '.join(modules)}; print([name for name in {names!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return result.stdout.strip()
