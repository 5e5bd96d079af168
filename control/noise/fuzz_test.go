package noise

import (
	"encoding/base64"
	"testing"

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
