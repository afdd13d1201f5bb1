"""Why a solve failed."""
