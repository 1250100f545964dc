"""Walk-forward splits, feature matrices and sequences."""
