package fault

import (
	"flag"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
)

func TestMain(m *testing.M) {
	flag.Parse()
	// Most tests here wait most of the time.
	if runtime.GOMAXPROCS(0) < waiting {
		flag.Set("test.parallel", strconv.Itoa(waiting))
	}
	code := m.Run()
	removeBinary()
	os.Exit(code)
}

// waiting is how many tests run beside each other.
const waiting = 6

func containsAll(text string, parts ...string) bool {
	for _, p := range parts {
		if !strings.Contains(text, p) {
			return false
		}
	}
	return true
}
