"""The made-up people of `data_modules.synthetic_facts.SyntheticFacts`."""
