package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// notMeasured stands in the page until there are figures.
const notMeasured = "Not measured yet.\n"

// parts are what the page docs/load.md shows of a series, by the names in its
// marks.
func parts(records []record) map[string]string {
	if len(records) == 0 {
		return map[string]string{"series": notMeasured, "targets": notMeasured, "plots": notMeasured, "paper": notMeasured}
	}
	all := rows(records)
	plots := ""
	for _, c := range charts {
		if len(c.curves(all)) > 0 {
			plots += fmt.Sprintf("![%s](plots/%s.svg)\n\n", c.alt(all), c.file)
		}
	}
	return map[string]string{
		"series":  origin(records) + tables(all) + failures(records),
		"targets": strings.TrimPrefix(verdicts(all), "\n"),
		"plots":   strings.TrimSuffix(plots, "\n"),
		"paper":   paper(all, assumed, []float64{1000, assumed.nodes - 1}),
	}
}

// fill puts the parts between their marks, <!-- name --> and <!-- /name -->.
func fill(page string, parts map[string]string) (string, error) {
	for name, text := range parts {
		begin, end := "<!-- "+name+" -->\n", "<!-- /"+name+" -->"
		before, rest, found := strings.Cut(page, begin)
		_, after, ended := strings.Cut(rest, end)
		if !found || !ended {
			return "", fmt.Errorf("the page has no place for %q: want %s and %s", name, strings.TrimSpace(begin), end)
		}
		page = before + begin + "\n" + text + "\n" + end + after
	}
	return page, nil
}

// writeDocs brings load.md and the plots in a directory up to the records.
func writeDocs(dir string, records []record) error {
	path := filepath.Join(dir, "load.md")
	page, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	text, err := fill(string(page), parts(records))
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if err := writePlots(filepath.Join(dir, "plots"), records); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(text), 0o644)
}

// fillDocs is the verb docs.
func fillDocs(_ context.Context, args []string) (bool, error) {
	set := flag.NewFlagSet("load docs", flag.ExitOnError)
	dir := set.String("docs", "docs", "directory with load.md")
	records, err := fromFile(set, args)
	if err != nil {
		return false, err
	}
	return true, writeDocs(*dir, records)
}
