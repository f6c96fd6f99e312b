"""Reading checkpoints, converting them to recursive models, writing them."""
