"""The `data` section of the recipes' configs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class SyntheticSection:
    """The built-in synthetic data (data.name=synthetic), whose best reachable metrics are known.

    Args:
        num_users: Users.
        num_items: Items, drawn by a Zipf law.
        events_per_user: Events of each user.
        num_interests: Ranking: interests of users, and topics of items.
        session_length: Ranking: items of a session; data.num_candidates should equal it.
        drift: Ranking: chance that a user's interest changes between sessions.
        zipf: Exponent of the items' popularity.
        num_successors: Retrieval: items that may follow an item.
        follow_probability: Retrieval: chance that one of them does.
        arriving: Ranking: share of the catalogue that is replaced by new ids from one session to the next.
        seed: Of the data; the run's own seed doesn't change it.
    """

    num_users: int = 4000
    num_items: int = 100
    events_per_user: int = 60
    num_interests: int = 3
    session_length: int = 10
    drift: float = 0.05
    zipf: float = 0.8
    num_successors: int = 4
    follow_probability: float = 0.7
    arriving: float = 0.0
    seed: int = 1


@dataclass
class AmazonSection:
    """Ratings of Amazon (data.name=amazon_ratings).

    Args:
        min_count: k of the k-core: users and items with fewer ratings are left out.
        core: "iterative" (until all that are left have k) or "once", as in the HSTU paper's preprocessing.
    """

    min_count: int = 5
    core: Literal["iterative", "once"] = "iterative"


@dataclass
class KuaiRandSection:
    """KuaiRand (data.name=kuairand).

    Args:
        random_log: Read log_random_*.csv too.
    """

    random_log: bool = False


@dataclass
class ParquetSection:
    """A table of your own (data.name=parquet).

    Args:
        layout: "events" (one row an event) or "sequences" (one row a user, columns of lists).
        user: Column of the user.
        item: Column of the item.
        timestamp: Column of the time; null for data without times.
        labels: Columns of the binary tasks (0 or 1); together they are the action.
        value: Column of a numeric value; null for none.
    """

    layout: Literal["events", "sequences"] = "events"
    user: str = "user"
    item: str = "item"
    timestamp: str | None = "timestamp"
    labels: list[str] = field(default_factory=list)
    value: str | None = None


@dataclass
class SplitSection:
    """Which events train, validate and test.

    Args:
        name: "leave_one_out" (each user's last event tests, the one before validates), "time" (the last share of all
            events tests) or "user" (a share of the users tests).
        val_share: Of the events ("time") or users ("user").
        test_share: The same for the test.
        seed: Which users, for "user".
    """

    name: Literal["leave_one_out", "time", "user"] = "leave_one_out"
    val_share: float = 0.1
    test_share: float = 0.1
    seed: int = 0


@dataclass
class DataConfig:
    """The data set, its cases and batches.

    Args:
        name: Reader: "synthetic"; "movielens" (100K, 1M or 20M); "amazon_sequences" (`user item item ...` lines);
            "amazon_ratings" (`user,item,rating,timestamp` csv); "kuairand" (Pure, 1K or 27K); "parquet" (your own).
        path: The data's file or folder; the synthetic data needs none.
        cache_dir: Where prepared data is kept; null for the environment variable GENREC_CACHE, else ~/.cache/genrec.
        tie_break: Order of one user's events at the same time: "input" (of the input, stable) or "item" (ascending id).
        remap_items: Number items 0 .. V - 1. false keeps raw ids, for dynamic tables.
        max_seqlen: Most events of a history; the newest are kept.
        batch_size: Cases of a training batch on each device.
        eval_batch_size: Cases of a validation or test batch; null for batch_size.
        token_budget: Instead of batch_size in training: cases of like length with at most so many events; null for off.
        side_features: Item features to use; null for all in ranking and none in retrieval.
        contextual_features: User features to use; null for all in ranking and none in retrieval.
        stochastic_length: alpha of Stochastic Length (arXiv 2402.17152, eq. 4), in (1, 2]; null for off.
        stochastic_selection: Which events it keeps: "random" or, mostly, "recent" ones.
        num_workers: Processes that make batches; 0 makes them in the trainer's own.
    """

    name: Literal["synthetic", "movielens", "amazon_sequences", "amazon_ratings", "kuairand", "parquet"] = "synthetic"
    path: str | None = None
    cache_dir: str | None = None
    tie_break: Literal["input", "item"] = "input"
    remap_items: bool = True
    max_seqlen: int = 50
    batch_size: int = 128
    eval_batch_size: int | None = None
    token_budget: int | None = None
    side_features: list[str] | None = None
    contextual_features: list[str] | None = None
    stochastic_length: float | None = None
    stochastic_selection: Literal["random", "recent"] = "random"
    num_workers: int = 0
    split: SplitSection = field(default_factory=SplitSection)
    synthetic: SyntheticSection = field(default_factory=SyntheticSection)
    amazon: AmazonSection = field(default_factory=AmazonSection)
    kuairand: KuaiRandSection = field(default_factory=KuaiRandSection)
    parquet: ParquetSection = field(default_factory=ParquetSection)


@dataclass
class RankingDataConfig(DataConfig):
    """The data of a ranking model.

    Args:
        num_candidates: A user's events are cut into blocks of so many; a block is ranked from what precedes it.
        min_history: Events that must precede a block.
        tasks: Labels to predict; null for all binary ones of the data. "value" is the numeric one, a regression.
    """

    num_candidates: int = 10
    min_history: int = 1
    tasks: list[str] | None = None
    split: SplitSection = field(default_factory=lambda: SplitSection(name="time"))


@dataclass
class RetrievalDataConfig(DataConfig):
    """The data of a retrieval model.

    Args:
        all_windows: Train on all events of users longer than max_seqlen, in several cases.
        query_time: Time by which the relative time bias asks: of the "next" event, as in the paper (the model knows
            when it is asked), or the event's "own".
        actions: Put the actions (ratings) into the history too.
    """

    all_windows: bool = False
    query_time: Literal["next", "own"] = "next"
    actions: bool = False
