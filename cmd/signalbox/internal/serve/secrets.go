package serve

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/db"
	"github.com/signalbox-net/signalbox/derp"
)

// secrets are the keys of the server. They are rows of the database, so a backup of it is complete and every server on it has the same.
type secrets struct {
	noise key.MachinePrivate
	derp  key.NodePrivate
	id    []byte // see register.Config.IDKey
	mesh  string // see derp.Config.MeshKey
}

// Names of the rows.
const (
	secretNoise = "noise_private_key"
	secretDERP  = "derp_private_key"
	secretID    = "login_id_key"
	secretMesh  = "derp_mesh_key"
	secretCert  = "derp_certificate:" // and the relay's host name
)

func (s *server) loadSecrets(ctx context.Context) error {
	noise, err := s.privateKey(ctx, secretNoise, "noise.private_key_path", s.cfg.Noise.PrivateKeyPath, func() string {
		return marshalKey(key.NewMachine())
	}, machinePublic)
	if err != nil {
		return err
	}
	if err := s.secrets.noise.UnmarshalText([]byte(noise)); err != nil {
		return fmt.Errorf("stored noise key: %w", err)
	}
	// Relays that forward to each other need keys of their own; a key file names that of the first.
	relayRow, relayFile := secretDERP, s.cfg.DERP.Server.PrivateKeyPath
	if s.self.ID > 1 {
		relayRow, relayFile = fmt.Sprintf("%s:%d", secretDERP, s.self.ID), ""
	}
	relay, err := s.privateKey(ctx, relayRow, "derp.server.private_key_path", relayFile, func() string {
		return marshalKey(key.NewNode())
	}, nodePublic)
	if err != nil {
		return err
	}
	if err := s.secrets.derp.UnmarshalText([]byte(relay)); err != nil {
		return fmt.Errorf("stored relay key: %w", err)
	}
	if strings.TrimSpace(noise) == strings.TrimSpace(relay) {
		return errors.New("derp.server.private_key_path and noise.private_key_path hold the same key; each needs its own")
	}
	if s.secrets.id, err = s.secret(ctx, secretID, random); err != nil {
		return err
	}
	mesh, err := s.secret(ctx, secretMesh, random)
	s.secrets.mesh = hex.EncodeToString(mesh)
	return err
}

func random() ([]byte, error) {
	b := make([]byte, 32)
	_, err := rand.Read(b)
	return b, err
}

// secret returns the row under name, made on first use. Servers that start at the same moment agree on one.
func (s *server) secret(ctx context.Context, name string, make func() ([]byte, error)) ([]byte, error) {
	var value []byte
	err := s.store.View(ctx, func(r *db.Reader) error {
		var err error
		value, err = r.Secret(name)
		return err
	})
	if err == nil {
		return value, nil
	}
	if !errors.Is(err, db.ErrNotFound) {
		return nil, fmt.Errorf("read secret %s: %w", name, err)
	}
	fresh, err := make()
	if err != nil {
		return nil, fmt.Errorf("make secret %s: %w", name, err)
	}
	_, err = s.store.Update(ctx, s.tailnet, system, func(tx *db.Tx) error {
		value, err = tx.PutSecretIfAbsent(name, fresh)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("store secret %s: %w", name, err)
	}
	return value, nil
}

// privateKey returns a stored key. A key file seeds an empty row; one that differs from the row is refused, since clients would be cut off
// for good by another key, and nobody can tell which of the two they know.
func (s *server) privateKey(ctx context.Context, name, option, path string, fresh func() string, public func(string) (string, error)) (string, error) {
	var seed string
	if path != "" {
		b, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("%s: %w", option, err)
		}
		if seed = strings.TrimSpace(string(b)); err == nil {
			if _, err := public(seed); err != nil {
				return "", fmt.Errorf("%s: %s does not hold a private key (privkey: and 64 hex digits): %w", option, path, err)
			}
		}
	}
	stored, err := s.secret(ctx, name, func() ([]byte, error) {
		if seed != "" {
			return []byte(seed), nil
		}
		return []byte(fresh()), nil
	})
	if err != nil {
		return "", err
	}
	if seed == "" || seed == string(stored) {
		return string(stored), nil
	}
	inFile, err := public(seed)
	if err != nil {
		return "", err
	}
	inRow, err := public(string(stored))
	if err != nil {
		return "", err
	}
	return "", fmt.Errorf("%s: the key in %s (public %s) is not the one in the database (public %s); "+
		"clients know the one they first met, so nothing was started: remove the option to use the database's", option, path, inFile, inRow)
}

func marshalKey(k interface{ MarshalText() ([]byte, error) }) string {
	b, err := k.MarshalText()
	if err != nil {
		panic(err) // a fresh key always marshals
	}
	return string(b)
}

func machinePublic(text string) (string, error) {
	var k key.MachinePrivate
	if err := k.UnmarshalText([]byte(text)); err != nil {
		return "", err
	}
	return k.Public().String(), nil
}

func nodePublic(text string) (string, error) {
	var k key.NodePrivate
	if err := k.UnmarshalText([]byte(text)); err != nil {
		return "", err
	}
	return k.Public().String(), nil
}

// certificate is the relay's pinned pair for one host name. An earlier name finds its earlier pair, so that the pin that clients know
// comes back with it.
func (s *server) certificate(ctx context.Context, host string) (cert, priv []byte, err error) {
	type pair struct{ Cert, Key string }
	b, err := s.secret(ctx, secretCert+host, func() ([]byte, error) {
		c, k, err := derp.NewPinnedCert(host, time.Now())
		if err != nil {
			return nil, err
		}
		return json.Marshal(pair{string(c), string(k)})
	})
	if err != nil {
		return nil, nil, err
	}
	var p pair
	if err := json.Unmarshal(b, &p); err != nil {
		return nil, nil, fmt.Errorf("stored relay certificate: %w", err)
	}
	return []byte(p.Cert), []byte(p.Key), nil
}

// sealingKey reads 32 bytes as they are, in hex or in base64.
func sealingKey(b []byte) ([]byte, error) {
	const size = 32
	if len(b) == size {
		return b, nil
	}
	text := strings.TrimSpace(string(b))
	if k, err := hex.DecodeString(text); err == nil && len(k) == size {
		return k, nil
	}
	if k, err := base64.StdEncoding.DecodeString(text); err == nil && len(k) == size {
		return k, nil
	}
	return nil, fmt.Errorf("it must hold %d bytes, plain, as hex or as base64", size)
}
