"""T3's theorems made runnable: mixtures with known densities, bounds, sequences, a diagnosis.

`mixtures`, `classifiers` and `errors` measure retain and forget error over grids of continuous
mixtures; `bounds` and `sequences` check every statement of docs/theory.md on finite instances;
`diagnose` applies the statements to a trained head.
"""
