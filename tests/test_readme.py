"""The README's words, run."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def test_api_snippet_runs(capsys):
    snippet = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL).group(1)
    exec(compile(snippet, str(README), "exec"), {})
    assert capsys.readouterr().out.splitlines() == ["s1q1k1 (2, 49, 192)", "s2q1k2 (2, 49, 192)"]


def test_every_verb_and_recipe_that_the_readme_names_exists():
    from fairseq_w2v2_light.cli.main import VERBS
    from fairseq_w2v2_light.models.recipe import recipe_path

    text = README.read_text(encoding="utf-8")
    assert set(re.findall(r"(?m)^ *w2v2-light ([a-z-]+)", text)) <= set(VERBS)
    for recipe in set(re.findall(r"pretraining/\w+", text)) - {"pretraining/NAME"}:
        assert recipe_path(recipe).is_file()
