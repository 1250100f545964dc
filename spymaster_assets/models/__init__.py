"""Model families behind one contract."""
