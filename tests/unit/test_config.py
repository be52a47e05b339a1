"""Configs: layers, inheritance, errors that name the key, help, the shipped files."""

import runpy
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from genrec import _config_loading as loading
from genrec.config import ConfigError, RankingConfig, RetrievalConfig, load_config, shipped_configs, to_yaml


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return str(path)


def test_layers_in_order(tmp_path):
    """Schema, then the base, then the file, then the command line."""
    write(tmp_path, "base.yaml", "seed: 5\nmodel: {hidden_dim: 32, num_layers: 3, num_heads: 4}\n")
    path = write(tmp_path, "mine.yaml", "base: base.yaml\nmodel: {num_layers: 4, num_heads: 8}\n")
    config = load_config(RankingConfig, path, ["model.num_heads=16", "optimizer.learning_rate=1e-2"])
    assert (config.seed, config.model.hidden_dim, config.model.num_layers, config.model.num_heads) == (5, 32, 4, 16)
    assert config.optimizer.learning_rate == 0.01
    assert config.trainer.max_epochs == RankingConfig().trainer.max_epochs


def test_types_are_converted():
    words = ["optimizer.betas=[0.8,1]", "trainer.devices=2", "trainer.limit_train_batches=0.5", "model.qk_dim=null"]
    config = load_config(RetrievalConfig, None, [*words, "model.options.a.b=x", "evaluation.top_ks=[5]"])
    assert config.optimizer.betas == (0.8, 1.0)
    assert config.trainer.devices == 2
    assert config.trainer.limit_train_batches == 0.5
    assert config.model.qk_dim is None
    assert config.model.options == {"a": {"b": "x"}}
    assert config.evaluation.top_ks == [5]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "trainer.max_epoch=1",
            "Unknown key 'trainer.max_epoch' in the command line. Did you mean 'trainer.max_epochs'",
        ),
        ("sed=1", "Unknown key 'sed' in the command line. Did you mean 'seed'"),
        ("embedding.optimizer.lr=1", "Unknown key 'embedding.optimizer.lr'.*Keys there: embedding.optimizer.name"),
        ("trainer.max_epochs=many", "Wrong value for 'trainer.max_epochs' in the command line.*Expected: int"),
        ("trainer.max_epochs=1.5", "Wrong value for 'trainer.max_epochs'.*Expected: int"),
        ("trainer.max_epochs.x=1", "Wrong value for 'trainer.max_epochs'"),
        ("trainer=3", "Wrong value for 'trainer'.*Expected: a section"),
        ("optimizer.betas=[1]", "Wrong value for 'optimizer.betas'.*Expected: \\[float, float\\]"),
        ("evaluation.top_ks=3", "Wrong value for 'evaluation.top_ks'"),
        ("model.name=sasrecc", "Wrong value for 'model.name'.*Expected: hstu . sasrec . popularity"),
        ("model.hidden_dim=null", "Wrong value for 'model.hidden_dim'.*Expected: int"),
        ("--trainer.max_epochs=3", "key=value without dashes"),
        ("trainer.max_epochs", "key=value"),
        ("seed=[1", "Can't read the command line"),
    ],
)
def test_a_wrong_word_names_the_key(word, message):
    with pytest.raises(ConfigError, match=message):
        load_config(RetrievalConfig, None, [word])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer:\n  max_epoch: 1\n", r"Unknown key 'trainer.max_epoch' in .*bad.yaml. Did you mean"),
        ("optimizer:\n  learning_rate: fast\n", r"Wrong value for 'optimizer.learning_rate' in .*bad.yaml"),
        ("seed: [1\n", r"bad.yaml: not valid YAML: .*line"),
        ("- seed\n", r"bad.yaml: expected `key: value`"),
        ("base: bad.yaml\n", r"leads back to itself"),
        ("base: [a, b]\n", r"`base` must be the name"),
        ("base: nowhere\n", r"No config 'nowhere'"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load_config(RankingConfig, write(tmp_path, "bad.yaml", text))


def test_an_unknown_config_lists_the_shipped_ones():
    with pytest.raises(ConfigError, match=r"Did you mean 'ranking'.*retrieval"):
        load_config(RankingConfig, "rankin")


def test_print_and_read_again(tmp_path):
    config = load_config(RetrievalConfig, None, ["model.options.x=[1,2]", "seed=9", "early_stopping.patience=3"])
    again = load_config(RetrievalConfig, write(tmp_path, "printed.yaml", to_yaml(config)))
    assert again == config


@pytest.mark.parametrize("schema", [RankingConfig, RetrievalConfig])
def test_help_documents_every_key(schema):
    text = loading.help_text(schema(), "usage line", "description")
    for entry in loading.list_fields(schema):
        assert f"  {entry.key}={loading.value_text(entry.value)}   ({loading.type_name(entry.type)})" in text
        assert len(entry.doc) > 5, entry
    for name in shipped_configs():
        assert name in text


def test_a_field_without_documentation_is_refused():
    @dataclass
    class Bare:
        """Nothing said.

        Args:
            known: What it is.
        """

        known: int = 1
        unknown: int = 2

    with pytest.raises(TypeError, match=r"Bare.unknown has no line under `Args:`"):
        list(loading.list_fields(Bare))


def test_documentation_of_base_classes_is_found():
    @dataclass
    class Base:
        """First.

        Args:
            one: The first,
                on two lines.
        """

        one: int = 1

    @dataclass
    class Derived(Base):
        """Second.

        Args:
            two: The second.
        """

        two: list[int] = field(default_factory=list)

    assert loading.field_docs(Derived) == {"one": "The first, on two lines.", "two": "The second."}


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_shipped_configs_load_and_say_what_they_are(name):
    schema = RankingConfig if name.startswith("ranking") else RetrievalConfig
    config = load_config(schema, name)
    assert config.run.dir == f"runs/{name}"
    path = shipped_configs()[name]
    assert path.read_text().startswith("# ")
    assert yaml.safe_load(path.read_text())


def test_the_installed_package_has_its_own_copy(tmp_path, monkeypatch):
    """As in a wheel: `recipes/` lies inside the package, and no checkout is around it."""
    package = tmp_path / "site-packages" / "genrec"
    (package / "recipes" / "configs").mkdir(parents=True)
    (package / "recipes" / "configs" / "ranking.yaml").write_text("# Mine\nseed: 77\n")
    monkeypatch.setattr(loading.genrec, "__file__", str(package / "__init__.py"))
    assert list(shipped_configs()) == ["ranking"]
    assert load_config(RankingConfig, "ranking").seed == 77


def test_the_reference_page_is_current():
    """Else run `python docs/make_config_reference.py`."""
    docs = Path(__file__).parents[2] / "docs"
    made = runpy.run_path(str(docs / "make_config_reference.py"))["page"]()
    assert (docs / "config.md").read_text(encoding="utf-8") == made
