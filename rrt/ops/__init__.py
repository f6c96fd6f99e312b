"""Array operations below all models: matrix products, least squares."""
