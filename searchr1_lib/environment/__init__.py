"""What may the model do: the protocol, an episode, its limits, and the tools, one a file."""
