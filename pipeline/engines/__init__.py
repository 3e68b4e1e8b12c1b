"""The only files that know how an engine is started."""
