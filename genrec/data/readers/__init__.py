"""Readers of public data sets, of a user's own Parquet tables, and of generated logs."""

from genrec.data.readers.amazon import AmazonRatings, AmazonSequences
from genrec.data.readers.kuairand import KuaiRand
from genrec.data.readers.movielens import MovieLens
from genrec.data.readers.parquet import ParquetTable
from genrec.data.synthetic import Synthetic

__all__ = ["AmazonRatings", "AmazonSequences", "KuaiRand", "MovieLens", "ParquetTable", "Synthetic"]
