"""Hub files, one per op. Public names are re-exported by `vidops`, not here, so that modules stay reachable."""
