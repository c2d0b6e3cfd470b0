import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FORBIDDEN = ("torch", "ray", "vllm", "deepspeed", "transformers", "pipeline", "teacher_dump", "student_train")


def test_storage_imports_nothing_of_teacher_or_student():
    modules = [f"storage.{path.stem}" for path in (REPOSITORY / "storage").glob("*.py") if path.stem != "__init__"]
    code = f"import sys, {', '.join(modules)}; print([name for name in {FORBIDDEN!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
