"""Code that is copied beside exports; it is not imported here."""
