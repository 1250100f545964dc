"""DBN files to trading sessions, contracts and bars."""
