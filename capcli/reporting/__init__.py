"""Results for people and machines, without torch: text, tables, pages, cards, reports for CI."""
