"""Recipes: `python -m genrec.recipes.ranking` and `python -m genrec.recipes.retrieval`."""
