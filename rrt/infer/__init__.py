"""Generation: sampling rules, cached decoding, text in and text out."""
