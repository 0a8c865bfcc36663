"""Methods x concepts x attacks x seeds: what to measure (spec), measuring it (runner), the table (leaderboard)."""
