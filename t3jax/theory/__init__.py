"""T3's theorems made runnable: mixtures with known densities, bounds, sequences, a diagnosis.

`mixtures`, `classifiers` and `errors` measure retain and forget error over grids of continuous
mixtures; `bounds` and `sequences` check every statement of docs/theory.md where all can be
enumerated; `diagnose` says what the statements make of a trained head.
"""
