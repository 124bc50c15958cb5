"""Models that can be decomposed; each module here builds an engine `Target` of one kind."""
