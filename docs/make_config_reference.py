"""Writes docs/config.md from the schemas: `python docs/make_config_reference.py`. A test keeps the page current."""

from pathlib import Path

from genrec._config_loading import reference_page
from genrec.config import RankingConfig, RetrievalConfig

INTRODUCTION = """
# Config reference

<!-- Made by docs/make_config_reference.py from genrec/config.py: change the docstrings there. -->

A config is the schema's defaults, then a YAML file (with `base: NAME_OR_PATH` the ones below it first), then
`key=value` words:

```bash
python -m genrec.recipes.ranking --config ranking_ml100k trainer.max_epochs=3
python -m genrec.recipes.ranking --config my.yaml --print-config
```

Unknown keys and wrong types are errors that name the key. `null` in a type means that the key may be left open. Lists
and dicts are written as in YAML: `evaluation.top_ks=[10,50]`.
"""


def page() -> str:
    """The page's text."""
    return reference_page({"Ranking": RankingConfig, "Retrieval": RetrievalConfig}, INTRODUCTION)


if __name__ == "__main__":
    (Path(__file__).parent / "config.md").write_text(page(), encoding="utf-8")
