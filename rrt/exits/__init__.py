"""Early exits: scores, gates kept with a model, lenses, masked forward."""
