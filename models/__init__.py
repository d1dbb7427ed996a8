"""Paper models: thin nets over vidops ops, one base name per paper. Import the one you need."""
