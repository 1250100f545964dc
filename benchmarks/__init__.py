"""Claims of speed, measured against their reference in the same process and printed as ratios: `make bench`."""
