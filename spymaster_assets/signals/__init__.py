"""Level-touch events: levels, touches, features and labels, each formula once."""
