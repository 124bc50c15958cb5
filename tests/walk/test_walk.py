"""What the walk through README.md takes, on a clone of a small repository."""

from __future__ import annotations

import subprocess

import pytest
from printed import ROOT

from walk import walk as walking

README = """\
```bash
make demo   # a comment
pip install something
```

```console
$ spd eval 'a run'
$ spd report gone
```

```python
print("from Python")
```
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    origin = tmp_path / "origin"
    origin.mkdir()
    (origin / "README.md").write_text(README)
    (origin / "Makefile").write_text("demo:\n\tmkdir -p .venv/bin\n\tcp spd .venv/bin\n")
    (origin / "spd").write_text('#!/bin/sh\necho first\necho "$@"\ntest "$1" = eval\n')
    (origin / "spd").chmod(0o755)
    git = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(walking, "ROOT", origin)
    return tmp_path


def test_every_step_is_taken_in_the_clone_with_its_own_programs(repository):
    reported = []
    steps = walking.walk(repository, [], reported.append)
    assert reported == steps
    assert [(step.command, step.exit) for step in steps] == [
        ("git clone REPOSITORY clone", 0),
        ("make demo", 0),
        ("spd eval 'a run'", 0),
        ("spd report gone", 1),
        (walking.PYTHON, 0),
    ]
    assert [step.last for step in steps[2:]] == ["eval a run", "report gone", "from Python"]
    assert all(0 <= step.processor_seconds <= step.seconds + 1 for step in steps)


def test_a_step_may_be_left_out(repository):
    steps = walking.walk(repository, ["make demo", "spd report gone"], print)
    assert [step.command for step in steps[1:]] == ["spd eval 'a run'", walking.PYTHON]


def test_what_readme_has_people_type():
    printed = [command for command, _ in walking.steps_of((ROOT / "README.md").read_text(encoding="utf-8"))]
    assert printed[:2] == ["make demo", "make test"]
    assert printed[-1] == walking.PYTHON
    assert "spd decompose smollm2-facts --out athletes" in printed
