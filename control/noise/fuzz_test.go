package noise

import (
	"bytes"
	"encoding/base64"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"tailscale.com/control/controlbase"
	"tailscale.com/types/key"
)

func FuzzDecodeInitiation(f *testing.F) {
	init, _, err := controlbase.ClientDeferred(key.NewMachine(), key.NewMachine().Public(), currentVersion)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(base64.StdEncoding.EncodeToString(init))
	f.Add("")
	f.Add("AAAA\r\nAAAA")
	f.Fuzz(func(t *testing.T, s string) {
		b, err := decodeInitiation(s)
		if err == nil && len(b) != initiationSize {
			t.Errorf("accepted %d bytes", len(b))
		}
	})
}

// However a stream is cut into reads, the same frames are counted.
func FuzzFrameCounter(f *testing.F) {
	var stream bytes.Buffer
	stream.WriteString(http2.ClientPreface)
	fr := http2.NewFramer(&stream, nil)
	fr.WriteSettings()
	fr.WriteData(1, false, make([]byte, 300))
	fr.WritePing(false, [8]byte{})
	fr.WriteRSTStream(1, http2.ErrCodeCancel)
	f.Add(stream.Bytes(), 7)
	f.Fuzz(func(t *testing.T, b []byte, size int) {
		now := func() time.Time { return time.Time{}.Add(time.Hour) }
		whole := frameCounter{rate: rateCounter{limit: 1 << 30}}
		whole.count(b, now)
		pieces := frameCounter{rate: rateCounter{limit: 1 << 30}}
		size = min(max(size, 1), 1<<20)
		for p := b; len(p) > 0; {
			n := min(size, len(p))
			pieces.count(p[:n], now)
			p = p[n:]
		}
		if whole.rate.n != pieces.rate.n {
			t.Errorf("whole %d, in pieces of %d: %d", whole.rate.n, size, pieces.rate.n)
		}
	})
}
