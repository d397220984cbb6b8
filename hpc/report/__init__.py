"""What a run was, for people: the page of a run, several runs side by side, the card of a model."""
