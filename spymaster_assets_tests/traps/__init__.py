"""A catalogue of small asset graphs, leaky by one mistake each or honest, on which the look-ahead detector is measured."""
