"""The units of a model: channels, features and heads that several weights have in common."""
